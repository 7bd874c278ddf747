""" Defaults, config files, documented commands, and what every script must be able to do. """
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, environment, run, train

from components.settings import check_train, new_model_config

CONFIG_FILES = sorted((ROOT / 'config').glob('*.py'))

# -----------------------------------------------------------------------------
# defaults


@pytest.fixture(scope='module')
def train_defaults():
    """ The settings at the top of train.py -> {name: value}. """
    source = (ROOT / 'train.py').read_text()
    names = {'__name__': 'train', '__file__': str(ROOT / 'train.py')}
    exec(source.split('\nexec(')[0], names)
    return names


def assert_settings(names, expected):
    assert {key: names[key] for key in expected} == expected


def test_defaults_are_those_of_nanogpt(train_defaults):
    assert_settings(train_defaults, dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch',
        wandb_log=False, wandb_project='owt', wandb_run_name='gpt2',
        dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12, block_size=1024,
        n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
        learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95,
        grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5))


def test_what_is_newer_is_off_by_default(train_defaults):
    assert_settings(train_defaults, dict(
        rotary=False, rope_base=10000, rmsnorm=False, qk_norm=False, untied=False, muon_lr=0.0,
        cooldown_iters=0, eval_split='val', checkpoint_interval=0, ema_decay=0.0,
        without_replacement=False, early_stopping=0))


def test_device_is_selected_automatically(train_defaults):
    names = ('device', 'dtype', 'compile', 'backend')
    assert_settings(train_defaults, dict.fromkeys(names, 'auto'))

# -----------------------------------------------------------------------------
# config files


@pytest.fixture
def read_settings(monkeypatch):
    """ read_settings(script, *arguments) -> the settings of a script that goes no further. """
    def execute(script, *arguments):
        source = (ROOT / script).read_text()
        names = {'__name__': '__main__', '__file__': str(ROOT / script)}
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        last_line = re.search(r"^exec\(.*configurator.*$", source, re.MULTILINE)
        exec(source[:last_line.end()], names)
        return names
    return execute


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.name)
def test_train_reads_every_config_file(read_settings, capsys, path):
    names = read_settings('train.py', path)
    assert names['config_overrides']
    assert capsys.readouterr().out == ''  # no name is unknown


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.name)
def test_settings_of_every_config_file_are_valid(read_settings, path):
    names = read_settings('train.py', path)
    config = {key: names[key] for key in names['config_keys']}
    config.update(device='cpu', dtype='float32', compile=False, backend='gloo', wandb_log=False)
    check_train(config, 'cpu', ddp=False, world_size=1, local_world_size=1)
    new_model_config(config, vocab_size=65)


@pytest.mark.parametrize('path', CONFIG_FILES, ids=lambda path: path.name)
def test_config_files_complete_the_decay(read_settings, path):
    """ The learning rate reaches min_lr at the end of the run. """
    names = read_settings('train.py', path)
    if names['decay_lr'] and not names['eval_only']:
        assert names['lr_decay_iters'] == names['max_iters']


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
    ('eval_gpt2', dict(init_from='gpt2')),
    ('eval_gpt2_medium', dict(init_from='gpt2-medium')),
    ('eval_gpt2_large', dict(init_from='gpt2-large')),
    ('eval_gpt2_xl', dict(init_from='gpt2-xl')),
])
def test_config_files_of_nanogpt(read_settings, name, expected):
    if name.startswith('eval_'):
        expected = dict(expected, batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
    names = read_settings('train.py', ROOT / f'config/{name}.py')
    assert_settings(names, expected)


def test_run_name_of_fine_tuning_has_the_time(read_settings):
    names = read_settings('train.py', ROOT / 'config/finetune_shakespeare.py')
    assert re.fullmatch(r'ft-\d+\.\d+', names['wandb_run_name'])

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
    paths = [ROOT / 'README.md', *CONFIG_FILES, *pages]
    cases = []
    for path in paths:
        for command in commands_in(path.read_text()):
            name = f'{path.relative_to(ROOT)}: {" ".join(command)}'
            cases.append(pytest.param(command, id=name))
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


def test_readme_has_commands():
    commands = commands_in((ROOT / 'README.md').read_text())
    assert {'train.py', 'sample.py', 'bench.py'} <= {command[0] for command in commands}
    assert len(commands) > 10

# -----------------------------------------------------------------------------
# every script


def test_scripts_run_from_any_folder(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['ckpt.pt', 'log.csv']
    text, _ = run('sample.py', cwd=tmp_path, num_samples=3, max_new_tokens=30, start='the cat')
    assert text.count('---------------\n') == 3
    assert text.count('the cat') >= 3
    run('plot.py', 'out', cwd=tmp_path, file='losses.svg')
    assert (tmp_path / 'losses.svg').exists()


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_start_up_imports_nothing_that_is_not_needed(tmp_path, script):
    command = [sys.executable, '-X', 'importtime', str(ROOT / script), '--help']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'torch' in imported
    assert not imported & {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}
