""" The prepare scripts, from input files to bins, and what a user does next with these. """
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers
from conftest import ROOT, flags, run, train
from fake_gpt2 import prose

from components import tokenizer as tokenizer_module


def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2').tolist()


def read_text(folder, split):
    """ The text of a split, decoded by the characters of meta.pkl. """
    itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
    return ''.join(itos[i] for i in read(folder, split))


def encode_all(tokenizer, texts, after=()):
    """ The ids of texts, each followed by the ids `after`. """
    ids = []
    for text in texts:
        ids += tokenizer.encode_ordinary(text)
        ids += after
    return ids


def write_jsonl(path, texts):
    path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path)


@pytest.fixture
def prepare(clone, tmp_path, monkeypatch, capsys):
    """
    prepare(folder, ...) runs data/<folder>/prepare.py of a copy of the repository in this process
    -> its output. An error is a SystemExit with the message.
    """
    monkeypatch.setattr(tokenizer_module, 'DATA_DIR', clone / 'data')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path)

    def execute(folder, *arguments, **settings):
        path = clone / 'data' / folder / 'prepare.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments, *flags(settings)])
        capsys.readouterr()
        names = {'__name__': '__main__', '__file__': str(path)}
        exec(compile(path.read_text(), path, 'exec'), names)
        assert not list(clone.glob('data/*/parts.tmp'))
        return capsys.readouterr().out

    return execute

# -----------------------------------------------------------------------------
# Shakespeare, Holmes, Python

SPEECH = 'First Citizen:\n\nSpeak, speak the speech.\n' * 50


def test_prepare_shakespeare_char(clone, prepare):
    folder = clone / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(SPEECH)
    out = prepare('shakespeare_char')
    num_train = int(len(SPEECH) * 0.9)
    assert read_text(folder, 'train') == SPEECH[:num_train]
    assert read_text(folder, 'val') == SPEECH[num_train:]
    assert f'vocabulary size: {len(set(SPEECH))}\ntrain.bin: {num_train:,} tokens\n' in out


def test_prepare_shakespeare(clone, prepare, gpt2):
    folder = clone / 'data/shakespeare'
    (folder / 'input.txt').write_text(SPEECH)
    prepare('shakespeare')
    num_train = int(len(SPEECH) * 0.9)
    assert read(folder, 'train') == gpt2.encode_ordinary(SPEECH[:num_train])
    assert read(folder, 'val') == gpt2.encode_ordinary(SPEECH[num_train:])
    assert not (folder / 'meta.pkl').exists()


@pytest.mark.parametrize('word', ['THE', 'THIS'])
def test_prepare_holmes_without_gutenbergs_text(clone, prepare, word):
    story = ('To Sherlock Holmes she is always THE woman.\n\n'
             'I have seldom heard him mention her.\n')
    text = ('\ufeffProject Gutenberg header, license\n'
            f'*** START OF {word} PROJECT GUTENBERG EBOOK A\nTITLE ***\n\n'
            f'Produced by a volunteer\nand another\n\n\n{story}\n\n'
            'End of the Project Gutenberg EBook of A Title\n'
            f'*** END OF {word} PROJECT GUTENBERG EBOOK A TITLE ***\n'
            'THE FULL PROJECT GUTENBERG LICENSE\n')
    folder = clone / 'data/holmes'
    (folder / 'input.txt').write_bytes(text.replace('\n', '\r\n').encode())
    prepare('holmes')
    assert read_text(folder, 'train') + read_text(folder, 'val') == story


@pytest.mark.slow
def test_prepare_python_char(clone):
    import __future__  # the first by path
    folder = clone / 'data/python_char'
    out, _ = run(folder / 'prepare.py', cwd=folder)
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == 96
    assert meta['itos'][0] == '\n'
    assert meta['itos'][95] == '~'
    text = read_text(folder, 'train')
    with open(__future__.__file__) as file:
        assert text[:3000] == file.read()[:3000]
    assert 5e6 < len(text) < 12e6
    assert 'SHA-256' in out


def test_prepare_unknown_flag(prepare):
    with pytest.raises(SystemExit) as stopped:
        prepare('shakespeare_char', source='x')
    assert stopped.value.code == 2


def test_prepare_help(prepare, capsys):
    """ The docstring and the settings, without the code below these. """
    with pytest.raises(SystemExit):
        prepare('custom', '--help')
    out = capsys.readouterr().out
    assert 'val_fraction = 0.1 ' in out
    assert 'def ' not in out

# -----------------------------------------------------------------------------
# datasets of rows


@pytest.mark.slow
def test_prepare_wikitext2(clone, tmp_path, prepare, gpt2):
    source = tmp_path / 'source'
    source.mkdir()
    rows = {}
    for seed, split in enumerate(('train', 'validation', 'test')):
        rows[split] = [*prose(3000, seed).splitlines(keepends=True), '']
        write_parquet(source / f'{split}-00000-of-00001.parquet', rows[split])
    prepare('wikitext2', source=source)
    folder = clone / 'data/wikitext2'
    assert read(folder, 'train') == encode_all(gpt2, rows['train'])
    assert read(folder, 'val') == encode_all(gpt2, rows['validation'])
    assert read(folder, 'test') == encode_all(gpt2, rows['test'])


@pytest.mark.usefixtures('gpt2')
def test_prepare_wikitext2_without_test_split(tmp_path, prepare):
    for name in ('train.jsonl', 'valid.jsonl'):
        write_jsonl(tmp_path / name, ['a'])
    with pytest.raises(SystemExit, match=r'no test\*\.parquet or test\*\.jsonl'):
        prepare('wikitext2', source=tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2')
def test_prepare_wikitext2_without_network(clone):
    folder = clone / 'data/wikitext2'
    _, error = run(folder / 'prepare.py', cwd=folder, code=1)
    assert '--source=FOLDER' in error.splitlines()[-1]
    assert 'Traceback' not in error


@pytest.mark.slow
def test_prepare_openwebtext_in_several_processes(clone, tmp_path, gpt2):
    import datasets
    sizes = np.random.default_rng(0).integers(10, 20_000, size=700).tolist()
    documents = [prose(size, seed=size) for size in sizes]
    write_jsonl(tmp_path / '0.jsonl', documents[:350])
    write_jsonl(tmp_path / '1.jsonl', documents[350:])
    folder = clone / 'data/openwebtext'
    out, _ = run(folder / 'prepare.py', cwd=tmp_path, source='.')
    assert 'documents: 700' in out
    assert 'WARNING' in out
    parts = datasets.Dataset.from_dict({'text': documents}).train_test_split(0.0005, seed=2357)
    assert read(folder, 'train') == encode_all(gpt2, parts['train']['text'], after=[50256])
    assert read(folder, 'val') == encode_all(gpt2, parts['test']['text'], after=[50256])
    assert not (folder / 'parts.tmp').exists()


@pytest.mark.slow
def test_prepare_bookcorpus(clone, tmp_path, prepare, gpt2):
    rows = [f'the cat sat {i} .' for i in range(130_001)]  # 65 are held out: 32 runs of two
    write_parquet(tmp_path / 'a.parquet', rows)
    prepare('bookcorpus', source='a.parquet')
    chosen = np.random.default_rng(2357).choice(65_000, 32, replace=False)
    is_val = np.zeros(130_001, dtype=bool)
    is_val[2 * chosen] = True
    is_val[2 * chosen + 1] = True
    newline = gpt2.encode_ordinary('\n')
    folder = clone / 'data/bookcorpus'
    val = [row for number, row in enumerate(rows) if is_val[number]]
    assert read(folder, 'val') == encode_all(gpt2, val, after=newline)
    train = [row for number, row in enumerate(rows) if not is_val[number]]
    assert read(folder, 'train') == encode_all(gpt2, train, after=newline)


@pytest.mark.usefixtures('gpt2')
def test_prepare_rows_bad_file(clone, tmp_path, prepare):
    """ One line; neither the source nor the dataset's folder changes. """
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(SystemExit, match='a.jsonl, line 2: no key .text.') as stopped:
        prepare('bookcorpus', source='a.jsonl')
    assert '\n' not in stopped.value.code
    names = sorted(path.name for path in (clone / 'data/bookcorpus').iterdir())
    assert names == ['prepare.py', 'readme.md']

# -----------------------------------------------------------------------------
# custom


def test_custom_one_document(tmp_path, prepare, gpt2):
    """ It is split by its characters, and the end-of-text token is the last of val.bin. """
    text = prose(5000)
    (tmp_path / 'mine').write_text(text)
    out = prepare('custom', source='mine', name=tmp_path / 'bins', val_fraction=0.2)
    num_train = int(0.8 * len(text))
    assert read(tmp_path / 'bins', 'train') == gpt2.encode_ordinary(text[:num_train])
    assert read(tmp_path / 'bins', 'val') == [*gpt2.encode_ordinary(text[num_train:]), 50256]
    data = f'--dataset={tmp_path}/bins --out_dir=out-bins'
    assert f'python train.py config/train_wikitext2_fast.py {data}\n' in out
    assert 'config/train_custom.py lists' in out
    assert f'python train.py config/finetune_shakespeare.py --init_from=gpt2 {data}\n' in out
    assert 'overriding: val_fraction = 0.2\n' in out


def test_custom_one_document_in_pieces(tmp_path, prepare, monkeypatch):
    from components import text_sources
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', 100)
    text = prose(5000)
    (tmp_path / 'mine.txt').write_text(text)
    prepare('custom', source='mine.txt', name=tmp_path / 'bins', tokenizer='char')
    num_train = int(0.9 * len(text))
    assert read_text(tmp_path / 'bins', 'train') == text[:num_train]
    assert read_text(tmp_path / 'bins', 'val') == text[num_train:]


def test_custom_several_documents(clone, tmp_path, prepare):
    """ Some documents are held out; empty files are none. """
    source = tmp_path / 'source'
    source.mkdir()
    documents = [f'document {i}\n' for i in range(10)]
    for number, document in enumerate(documents):
        (source / f'{number}.txt').write_text(document)
    (source / 'empty.txt').write_text('')
    out = prepare('custom', source='source', name='mine', tokenizer='char', val_fraction=0.3)
    assert '11 files, 10 documents, 110 characters' in out
    assert 'python train.py config/train_custom.py --dataset=mine --out_dir=out-mine\n' in out
    held_out = set(np.random.default_rng(2357).permutation(10)[:3].tolist())
    folder = clone / 'data/mine'
    val = [document for number, document in enumerate(documents) if number in held_out]
    assert read_text(folder, 'val') == ''.join(val)
    train = [document for number, document in enumerate(documents) if number not in held_out]
    assert read_text(folder, 'train') == ''.join(train)


@pytest.mark.parametrize('settings, message', [
    pytest.param(dict(source='nowhere'), 'nowhere does not exist', id='missing source'),
    pytest.param(dict(), 'set --source=', id='no source'),
    pytest.param(dict(source='.', tokenizer='gpt-2'), "tokenizer='gpt-2'", id='tokenizer'),
    pytest.param(dict(source='.', tokenizer='.'), 'no tokenizer', id='no tokenizer'),
    pytest.param(dict(source='.', val_fraction=1), 'val_fraction=1.0', id='val_fraction'),
    pytest.param(dict(source='.', name='shakespeare'), 'choose another --name', id='name taken'),
    pytest.param(dict(source='.', name=''), "name=''", id='empty name'),
    pytest.param(dict(source='.', name='../x'), "name='../x'", id='name outside of data'),
    pytest.param(dict(source='clone/config', name='empty'), r'no \*.txt or \*.jsonl', id='no file'),
    pytest.param(dict(source='latin.txt', name='bad'), 'line 1: not in UTF-8', id='not in UTF-8'),
])
def test_custom_refuses(clone, tmp_path, prepare, settings, message):
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
    (tmp_path / 'good.txt').write_text('text\n')
    before = sorted((clone / 'data').iterdir())
    if settings.get('source') == '.':
        settings = {**settings, 'source': 'good.txt'}
    with pytest.raises(SystemExit, match=message) as stopped:
        prepare('custom', **settings)
    assert '\n' not in stopped.value.code
    assert sorted((clone / 'data').iterdir()) == before


@pytest.mark.parametrize('kind, message', [
    pytest.param('BPE', "no token for '\u00e9'; it would be lost", id='BPE drops it'),
    pytest.param('WordLevel', "no tokens for '\u00e9'", id='WordLevel raises'),
])
def test_custom_tokenizer_without_a_character(tmp_path, prepare, kind, message):
    vocabulary = {'a': 0, 'b': 1, '\n': 2}
    if kind == 'BPE':
        model = tokenizers.models.BPE(vocabulary, [])
    else:
        model = tokenizers.models.WordLevel(vocabulary)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    saved.save_pretrained(tmp_path / 'hf')
    (tmp_path / 'a.txt').write_text('ab\nab\u00e9\n')
    with pytest.raises(SystemExit, match=message):
        prepare('custom', source='a.txt', name=tmp_path / 'bins', tokenizer='hf')
    assert not (tmp_path / 'bins').exists()


@pytest.fixture
def bpe(tmp_path):
    """ A byte-level BPE with an end-of-text token, saved as the Hugging Face directory hf. """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<eos>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(['the cat sat on a mat.\n'] * 20, trainer)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<eos>')
    saved.save_pretrained(tmp_path / 'hf')
    bpe.encode_special_tokens = True  # their names in a text are text
    return bpe


@pytest.mark.slow
def test_custom_hugging_face_tokenizer_trained_and_sampled(tmp_path, bpe):
    """ Documents in files of three kinds. The dataset and the checkpoint hold the tokenizer. """
    documents = [f'the cat {i} sat on a mat.\n' * 20 for i in range(20)]
    documents[3] += '<eos>'
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'a.txt').write_text(documents[0])
    write_parquet(source / 'b.parquet', documents[1:10])
    write_jsonl(source / 'c.jsonl', documents[10:])
    folder = tmp_path / 'bins'
    out, _ = run('data/custom/prepare.py', cwd=tmp_path, source='source', name=folder,
                 tokenizer='hf', val_fraction=0.2)
    assert '3 files, 20 documents' in out
    held_out = set(np.random.default_rng(2357).permutation(20)[:4].tolist())
    expected = {'train': [], 'val': []}
    for number, document in enumerate(documents):
        split = 'val' if number in held_out else 'train'
        expected[split] += [*bpe.encode(document).ids, bpe.token_to_id('<eos>')]
    assert read(folder, 'train') == expected['train']
    assert read(folder, 'val') == expected['val']

    shutil.rmtree(tmp_path / 'hf')
    train(tmp_path, folder, max_iters=200, lr_decay_iters=200, eval_interval=0)
    shutil.rmtree(folder)
    out, _ = run('sample.py', cwd=tmp_path, start='the cat', num_samples=1, max_new_tokens=40)
    assert 'the cat' in out
    assert ' sat on' in out


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2')
def test_custom_gpt2_tokens_trained_and_sampled(tmp_path):
    (tmp_path / 'mine').write_text(prose(5000))
    folder = tmp_path / 'bins'
    run('data/custom/prepare.py', cwd=tmp_path, source='mine', name=folder)
    train(tmp_path, folder, max_iters=2)
    prompt = 'the<|endoftext|>'
    out, _ = run('sample.py', cwd=tmp_path, start=prompt, num_samples=1, max_new_tokens=5)
    assert prompt in out


@pytest.mark.slow
def test_custom_config(tmp_path):
    """ The command that the script prints, with fewer iterations. """
    (tmp_path / 'mine.txt').write_text(prose(20_000))
    folder = tmp_path / 'bins'
    out, _ = run('data/custom/prepare.py', cwd=tmp_path, source='mine.txt', name=folder,
                 tokenizer='char')
    _, command = out.splitlines()[-1].split('python train.py config/train_custom.py ')
    config = ROOT / 'config/train_custom.py'
    few = dict(max_iters=20, lr_decay_iters=20, cooldown_iters=10, eval_interval=20, eval_iters=2,
               device='cpu', compile=False)
    run('train.py', config, *command.split(), cwd=tmp_path, **few)
    out, _ = run('sample.py', cwd=tmp_path, out_dir='out-bins', num_samples=1, max_new_tokens=5)
    assert '-' * 15 in out

# -----------------------------------------------------------------------------
# interruptions


def start_long_preparation(tmp_path, **settings):
    """ Starts data/custom/prepare.py -> the process, with its first batch finished. """
    command = [sys.executable, ROOT / 'data/custom/prepare.py', '--source=a.txt',
               f'--name={tmp_path}/bins']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, **settings)
    while not finished_batches(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def finished_batches(tmp_path):
    return list(tmp_path.glob('bins/parts.tmp/train-000000-????????????????'))


def running_workers():
    """ {worker process: its parent}, without processes that have ended (zombies). """
    command = ['ps', '-eo', 'pid,ppid,stat,args', '-ww']
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    workers = {}
    for line in lines[1:]:
        pid, parent, state, arguments = line.split(maxsplit=3)
        if 'spawn_main' in arguments and not state.startswith('Z'):
            workers[int(pid)] = int(parent)
    return workers


def workers_of(process):
    workers = running_workers()
    return {pid for pid in workers if workers[pid] == process.pid}


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
def test_killed_preparation_continues(tmp_path, gpt2):
    """ kill -9 of the script: its workers end too, no bin exists, finished batches are kept. """
    text = prose(12_000_000)
    (tmp_path / 'a.txt').write_text(text)
    folder = tmp_path / 'bins'
    process = start_long_preparation(tmp_path)
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait()
    process.stderr.close()  # a worker that still runs would keep it open
    time.sleep(1)
    assert not workers & set(running_workers())
    assert [path.name for path in folder.iterdir()] == ['parts.tmp']

    first = finished_batches(tmp_path)[0]
    num_kept = first.stat().st_size // 2
    first.write_bytes(bytes(2 * num_kept))  # to recognize it
    out, _ = run('data/custom/prepare.py', cwd=tmp_path, source='a.txt', name=folder)
    assert 'from an interrupted run' in out
    num_train = int(len(text) * 0.9)
    train_ids = read(folder, 'train')
    assert train_ids[:num_kept] == [0] * num_kept
    assert train_ids[num_kept:] == gpt2.encode_ordinary(text[:num_train])[num_kept:]
    assert read(folder, 'val') == [*gpt2.encode_ordinary(text[num_train:]), 50256]
    assert sorted(path.name for path in folder.iterdir()) == ['train.bin', 'val.bin']


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
@pytest.mark.usefixtures('gpt2')
def test_killed_workers(tmp_path):
    """ As the system kills them where memory runs out: one line, finished batches are kept. """
    (tmp_path / 'a.txt').write_text(prose(12_000_000))
    process = start_long_preparation(tmp_path)
    for worker in workers_of(process):
        os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'memory ran out; run the same command to continue' in error.splitlines()[-1]
    assert 'Traceback' not in error
    assert finished_batches(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs the signals of POSIX')
@pytest.mark.usefixtures('gpt2')
def test_ctrl_c_twice(tmp_path):
    """ One line without a worker's traceback; the finished batches stay. """
    (tmp_path / 'a.txt').write_text(prose(12_000_000))
    process = start_long_preparation(
        tmp_path, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # shells may ignore it
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[-1] == 'prepare.py: interrupted; run the same command to continue'
    assert 'Traceback' not in error
    assert finished_batches(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs fcntl')
def test_one_preparation_at_a_time(tmp_path):
    folder = tmp_path / 'bins'
    folder.mkdir()
    code = ('import fcntl, os, sys\n'
            'fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n'
            'print(1, flush=True)\n'
            'input()\n')
    other = subprocess.Popen([sys.executable, '-c', code, folder], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    (tmp_path / 'a.txt').write_text('some text')
    settings = dict(source='a.txt', name=folder, tokenizer='char')
    _, error = run('data/custom/prepare.py', cwd=tmp_path, code=1, **settings)
    assert 'another process is preparing' in error
    other.communicate(b'\n')
    run('data/custom/prepare.py', cwd=tmp_path, **settings)
