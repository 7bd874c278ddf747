""" Defaults, config files, documented commands, and what is imported at the start. """
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from components.settings import check_train, new_model_config

CONFIG_FILES = sorted((ROOT / 'config').glob('*.py'))


@pytest.fixture
def read_settings(monkeypatch):
    """ read_settings(*arguments) -> the settings of train.py, which goes no further. """
    def execute(*arguments):
        source = (ROOT / 'train.py').read_text()
        names = {'__name__': '__main__', '__file__': str(ROOT / 'train.py')}
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, arguments)])
        last_line = re.search(r'^exec\(.*configurator.*$', source, re.MULTILINE)
        exec(source[:last_line.end()], names)
        return {key: names[key] for key in names['config_keys']}
    return execute


@pytest.mark.parametrize('expected', [
    pytest.param(dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch',
        wandb_log=False, wandb_project='owt', wandb_run_name='gpt2',
        dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12, block_size=1024,
        n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
        learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95,
        grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5), id='nanoGPT'),
    pytest.param(dict(
        rotary=False, rope_base=10000, rmsnorm=False, qk_norm=False, untied=False, muon_lr=0.0,
        cooldown_iters=0, eval_split='val', checkpoint_interval=0, without_replacement=False,
        early_stopping=0), id='not in nanoGPT, and off'),
    pytest.param(dict.fromkeys(('device', 'dtype', 'compile', 'backend'), 'auto'), id='auto'),
])
def test_defaults(read_settings, expected):
    assert read_settings().items() >= expected.items()


EVALUATION = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)


@pytest.mark.parametrize('name, expected', [
    ('train_gpt2', dict(
        wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12,
        block_size=1024, gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000,
        eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=0.1)),
    ('train_shakespeare_char', dict(
        out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False, wandb_log=False, wandb_project='shakespeare-char',
        wandb_run_name='mini-gpt', dataset='shakespeare_char', gradient_accumulation_steps=1,
        batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
        learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99,
        warmup_iters=100)),
    ('finetune_shakespeare', dict(
        out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_log=False,
        wandb_project='shakespeare', dataset='shakespeare', init_from='gpt2-xl',
        always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32, max_iters=20,
        learning_rate=3e-5, decay_lr=False)),
    ('eval_gpt2', dict(EVALUATION, init_from='gpt2')),
    ('eval_gpt2_medium', dict(EVALUATION, init_from='gpt2-medium')),
    ('eval_gpt2_large', dict(EVALUATION, init_from='gpt2-large')),
    ('eval_gpt2_xl', dict(EVALUATION, init_from='gpt2-xl')),
])
def test_config_files_of_nanogpt(read_settings, name, expected):
    settings = read_settings(ROOT / f'config/{name}.py')
    assert settings.items() >= expected.items()
    if name == 'finetune_shakespeare':
        assert re.fullmatch(r'ft-\d+\.\d+', settings['wandb_run_name'])


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.name)
def test_config_file(read_settings, capsys, path):
    """ All names are settings, the settings are valid, and the decay ends with the run. """
    settings = read_settings(path)
    assert capsys.readouterr().out == ''  # no name is unknown
    if settings['decay_lr'] and not settings['eval_only']:
        assert settings['lr_decay_iters'] == settings['max_iters']
    settings.update(device='cpu', dtype='float32', compile=False, backend='gloo', wandb_log=False)
    check_train(settings, 'cpu', ddp=False, world_size=1)
    new_model_config(settings, vocab_size=65)

# -----------------------------------------------------------------------------
# commands in texts


def commands_in(text):
    """ The commands `python SCRIPT ...` and `torchrun ... SCRIPT ...` -> [[SCRIPT, ...], ...]. """
    text = text.replace('\\\n', ' ')
    commands = []
    for line in re.findall(r'^(?:#   )?(?:python|torchrun) .*$', text, re.MULTILINE):
        words = shlex.split(line.removeprefix('#   ').replace("$'", "'"), comments=True)
        for position, word in enumerate(words):
            if word.endswith('.py'):
                commands.append(words[position:])
                break
    return commands


def documented_commands():
    """ The commands in the README, in config files and in the pages about them and datasets. """
    pages = [*sorted(ROOT.glob('config/*.md')), *sorted(ROOT.glob('data/*/readme.md'))]
    cases = []
    for path in [ROOT / 'README.md', *CONFIG_FILES, *pages]:
        for command in commands_in(path.read_text()):
            name = f'{path.relative_to(ROOT)}: {" ".join(command)}'
            cases.append(pytest.param(command, id=name))
    assert len(cases) > 30
    return cases


@pytest.mark.parametrize('command', documented_commands())
def test_documented_command(script_globals, command):
    """ Its script and its config files exist, and its settings as well. """
    script, *arguments = command
    arguments = [str(ROOT / word) if word.startswith('config/') else word for word in arguments]
    if script == 'plot.py':  # its arguments are folders
        arguments = [word for word in arguments if word.startswith('--')]
    with pytest.raises(SystemExit) as stopped:
        script_globals(script, *arguments, '--help')  # it comes last: the rest has been read
    assert stopped.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_start_up_imports_nothing_that_is_not_needed(tmp_path, script):
    command = [sys.executable, '-X', 'importtime', str(ROOT / script), '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'torch' in imported
    assert not imported & {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}
