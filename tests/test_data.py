""" The way from texts to bins: the same tokens as a plain loop, whole or not at all, errors in one line. """
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, SMALL, run, train

import bins
import texts

# A tokenizer with GPT-2's way of splitting text and a handful of its merges, in place of GPT-2's, which
# has to be fetched. sitecustomize.py is run by every Python that starts, worker processes included.
SITECUSTOMIZE = r'''
import tiktoken, tiktoken.registry
pieces = [bytes([i]) for i in range(256)] + [b'\n\n', b' t', b'he', b' the', b'\n ', b'th', b' a', b'  ']
pieces += [b'\xff%d' % i for i in range(len(pieces), 50256)]  # in no text
tiktoken.registry.ENCODINGS['gpt2'] = tiktoken.Encoding('gpt2',
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={piece: i for i, piece in enumerate(pieces)}, special_tokens={'<|endoftext|>': 50256})
'''


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """ The tokenizer above as GPT-2's, here and in every process that is started. """
    site = tmp_path / 'site'
    site.mkdir()
    (site / 'sitecustomize.py').write_text(SITECUSTOMIZE)
    monkeypatch.setenv('PYTHONPATH', str(site))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    exec(SITECUSTOMIZE)
    return tiktoken.get_encoding('gpt2')


def prose(n, seed=0):
    """ About `n` characters of words, blank lines, runs of spaces and a letter beyond ASCII. """
    words = np.array(['the ', 'cat', '\n', '\n\n', ' sat', '  ', '\u00e9t\u00e9 ', "it's ", '42', '!', '\t'])
    return ''.join(words[np.random.default_rng(seed).integers(len(words), size=n // 3)])


def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2').tolist()


def prepare(folder, *args, code=0):
    out, error = run(folder / 'prepare.py', *args, cwd=folder, code=code)
    assert not (folder / 'parts.tmp').exists()
    return out if code == 0 else error.splitlines()[-1]


# -----------------------------------------------------------------------------
# downloads

def test_download(tmp_path, monkeypatch):
    source = tmp_path / 'source.txt'
    source.write_text('To be, or not to be')
    path = tmp_path / 'input.txt'
    with pytest.raises(OSError, match=r'not the text that was expected.*input\.txt.*python_char'):
        texts.download(source.as_uri(), path, 64 * '0')
    with pytest.raises(OSError, match=r'Save that text as .*input\.txt.*python_char'):
        texts.download((tmp_path / 'missing').as_uri(), path)
    assert not path.exists()
    texts.download(source.as_uri(), path, texts.sha256(source.read_bytes()).hexdigest())
    assert path.read_text() == source.read_text()
    monkeypatch.setattr(urllib.request, 'urlopen', None)  # a file that is there is used as it is
    texts.download('http://nowhere', path, 64 * '0')


def test_a_download_that_breaks_off_leaves_nothing(tmp_path):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == '/missing' else 200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'x' * (400 if self.path == '/half' else 1000))

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f'http://127.0.0.1:{server.server_port}', tmp_path / 'input.txt'
    for name, message in (('half', '400 bytes read, 600 more expected'), ('missing', '404')):
        with pytest.raises(OSError, match=message):
            texts.download(f'{url}/{name}', path)
        assert not list(tmp_path.iterdir())
    texts.download(f'{url}/all', path)
    server.shutdown()
    assert path.read_text() == 'x' * 1000


# -----------------------------------------------------------------------------
# reading

def test_a_long_text_is_cut_where_no_token_goes_on(tmp_path, gpt2):
    text = prose(4_000_000)
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    pieces = list(texts.read_texts(tmp_path / 'a.txt'))
    assert pieces.pop() is None and len(pieces) > 3 and max(map(len, pieces)) < 2_000_000
    assert ''.join(pieces) == text
    ids = [i for piece in pieces for i in gpt2.encode_ordinary(piece)]
    assert ids == gpt2.encode_ordinary(text)
    lines = ' the cat \x1c \n\n  \n' * 200_000  # as in WikiText's own files, white space ends every line
    (tmp_path / 'a.txt').write_text(lines)
    pieces = list(texts.read_texts(tmp_path / 'a.txt'))[:-1]
    ids = [i for piece in pieces for i in gpt2.encode_ordinary(piece)]
    assert len(pieces) > 3 and ids == gpt2.encode_ordinary(lines)


def test_a_short_text_is_one_piece_and_an_empty_file_none(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/a.txt').write_text('Hello world.\n\n')
    (tmp_path / 'in/b.txt').write_text('')
    (tmp_path / 'in/.git').mkdir()
    (tmp_path / 'in/.git/c.txt').write_text('x')
    (tmp_path / 'in/.d.txt').write_text('x')
    (tmp_path / 'in/link').symlink_to(tmp_path)
    (tmp_path / 'in/broken.txt').symlink_to(tmp_path / 'nowhere')
    assert list(texts.read_texts(tmp_path / 'in/a.txt')) == ['Hello world.\n\n', None]
    settings = dict(source='in', name=tmp_path / 'bins', tokenizer='char')
    out, _ = run('data/custom/prepare.py', cwd=tmp_path, **settings)
    assert '3 files of other kinds' in out and '2 files, 1 documents, 14 characters' in out


def test_rows_of_files(tmp_path):
    rows = ['one\n', '', 'tw\u00f6 <|endoftext|>']
    (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'text': row, 'x': [1]}) + '\n\n' for row in rows))
    pq.write_table(pa.table({'n': [1, 2, 3], 'text': rows}), tmp_path / 'a.parquet', row_group_size=2)
    (tmp_path / 'c.md').write_text('left out')
    paths = texts.find_texts(tmp_path, '.jsonl', '.parquet')
    assert [path.name for path in paths] == ['a.parquet', 'b.jsonl']
    for path in paths:
        assert list(texts.read_texts(path)) == [each for row in rows for each in (row, None)]
    assert texts.find_texts(tmp_path / 'b.jsonl', '.jsonl') == [tmp_path / 'b.jsonl']
    (tmp_path / 'within').mkdir()
    (tmp_path / 'within/b.jsonl').write_text('{"text": "a"}')
    assert tmp_path / 'within/b.jsonl' in texts.find_texts(tmp_path, '.jsonl')
    assert texts.find_texts(tmp_path, '.jsonl', prefix='b') == [tmp_path / 'b.jsonl']


@pytest.mark.parametrize('name, content, message', [
    ('a.txt', b'one\ntwo\nthr\xe9e\n', 'a.txt, line 3: not in UTF-8'),
    ('a.txt', b'', 'a.txt: there is no text in it'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "b"\n', 'a.jsonl, line 2: Expecting'),
    ('a.jsonl', b'{"text": "a"}\n\n{"txt": "b"}\n', "a.jsonl, line 3: no key text"),
    ('a.jsonl', b'{"text": 3}\n', 'a.jsonl, line 1'),
    ('a.jsonl', b'{"text": "\xe9"}\n', 'a.jsonl, line 1: \'utf-8\' codec'),
    ('a.jsonl', b'[1]\n', 'a.jsonl, line 1'),
    ('a.jsonl', b'[' * 100_000, 'a.jsonl, line 1: maximum recursion'),
    ('a.jsonl', rb'{"text": "\ud800"}', 'a.jsonl, line 1: \'utf-8\' codec'),
    ('a.parquet', b'not one', 'a.parquet: '),
    ('a.parquet', {'txt': ['a']}, 'a.parquet: no column text, but txt'),
    ('a.parquet', {'text': ['a', None]}, 'a.parquet: row 2: None is no text'),
    ('a.parquet', {'text': [1]}, 'a.parquet: row 1: 1 is no text')])
@pytest.mark.parametrize('script', ['custom', 'bookcorpus'])
def test_bad_files_get_one_line(tmp_path, monkeypatch, clone, capsys, gpt2, script, name, content, message):
    """ In this process; sys.exit with a text prints it on standard error, exit code 1. """
    if script == 'bookcorpus' and name == 'a.txt':
        message = 'no *.parquet or *.jsonl'
    source = tmp_path / 'source'
    source.mkdir()
    if isinstance(content, dict):
        pq.write_table(pa.table(content), source / name)
    else:
        (source / name).write_bytes(content)
    path = clone / 'data' / script / 'prepare.py'
    monkeypatch.setattr(bins, 'DATA', tmp_path)
    monkeypatch.setattr(sys, 'argv', [str(path), f'--source={source}'])
    before = sorted(path for path in tmp_path.rglob('*') if '__pycache__' not in str(path))
    with pytest.raises(SystemExit) as stopped:
        exec(compile(path.read_text(), path, 'exec'), {'__name__': '__main__', '__file__': str(path)})
    assert message in stopped.value.code and '\n' not in stopped.value.code
    assert sorted(path for path in tmp_path.rglob('*') if '__pycache__' not in str(path)) == before


def test_the_place_of_an_error_far_down_in_a_file(tmp_path):
    pq.write_table(pa.table({'text': [*map(str, range(2500)), None]}), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match='row 2501: None'):
        list(texts.read_texts(tmp_path / 'a.parquet'))
    (tmp_path / 'a.txt').write_bytes(b'one line\n' * 300_000 + b'thr\xe9e\n')
    with pytest.raises(ValueError, match='line 300001: not in UTF-8'):
        list(texts.read_texts(tmp_path / 'a.txt'))


@pytest.mark.parametrize('flags, message', [
    (['--source=nowhere'], 'nowhere is not there'),
    (['--source=.', '--tokenizer=gpt-2'], "tokenizer='gpt-2' must be gpt2, char, or a"),
    (['--source=.', '--tokenizer=.'], 'no tokenizer there'),
    ([], 'set --source='),
    (['--source=.', '--val_fraction=1'], 'val_fraction=1.0'),
    (['--source=.', '--name=shakespeare'], 'is taken'),
    (['--source=.', '--name='], "name=''"),
    (['--source=.', '--name=../x'], "name='../x'"),
    (['--source=.', '--name=empty'], 'no *.txt or *.jsonl or *.parquet')])
def test_custom_refuses(clone, flags, message):
    folder = clone / 'data/custom'
    assert message in prepare(folder, *flags, code=1)
    assert not (clone / 'data/empty').exists()


# -----------------------------------------------------------------------------
# writing

def test_characters_there_and_back(tmp_path, monkeypatch, capsys):
    text = 'zyx\u00e9\U0001f600 hello\n' * 10
    record = {'kind': 'char', 'itos': sorted(set(text))}
    texts.write_bins(tmp_path, {'train': [text[:100]], 'val': [text[100:], None]}, record, len(text))
    monkeypatch.setattr(bins, 'DATA', tmp_path.parent)
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    assert set(meta) == {'vocab_size', 'stoi', 'itos'}
    assert [meta['itos'][i] for i in range(meta['vocab_size'])] == sorted(set(text))
    ids = read(tmp_path, 'train') + read(tmp_path, 'val')
    assert bins.tokenizer_record(bins.load_meta(tmp_path.name)) == record
    encode, decode, size, end = bins.get_tokenizer(record)
    assert decode(ids) == text and encode(text) == ids and size == meta['vocab_size'] and end is None
    assert f'val.bin: {len(text) - 100} tokens' in capsys.readouterr().out


def test_ids_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    for ids in ([70000], [65536], [-1]):
        monkeypatch.setattr(texts, '_tokenizer', ({}, lambda text: np.array(ids), None, None, None), False)
        with pytest.raises(ValueError, match='uint16'):
            texts._encode(tmp_path / 'a', ['text'])
    monkeypatch.setattr(texts, '_tokenizer', ({}, lambda text: [0, 65535, 256], None, None, 7), False)
    assert texts._encode(tmp_path / 'a', ['', None]).read_bytes() == b'\x00\x00\xff\xff\x00\x01\x07\x00'


def test_a_disk_that_is_full_is_noticed_first(tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match=r'1.0 MB are to be written, and 0.0 MB are free'):
        texts.write_bins(tmp_path, {'train': ['a']}, {'kind': 'gpt2'}, 1_000_000)
    with pytest.raises(OSError, match='are free'):  # the estimate was too low
        texts.write_bins(tmp_path, {'train': ['a b ' * 10_000]}, {'kind': 'gpt2'}, 1000)
    assert not list(tmp_path.glob('*.bin*'))


def test_characters_take_twice_their_bytes_twice(tmp_path, monkeypatch):
    """ Two bytes a token, in the batch and in the bin. """
    for free, enough in ((3999, False), (4000, True)):
        monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free))
        try:
            texts.write_bins(tmp_path, {'train': ['a' * 1000]}, {'kind': 'char', 'itos': ['a']}, 1000)
        except OSError:
            assert not enough
        assert (tmp_path / 'train.bin').exists() == enough


def test_short_texts_come_in_batches_too():
    batches = list(texts._batches([''] * 3_000_000))
    assert len(batches) == 2 and max(len(batch) for batch, _ in batches) == 2**21


def test_what_a_kill_left_of_a_bin_is_removed(tmp_path):
    (tmp_path / 'test.bin.tmp').write_text('half')
    texts.write_bins(tmp_path, {'train': ['a']}, {'kind': 'char', 'itos': ['a']}, 1)
    assert not list(tmp_path.glob('*.bin.tmp'))


def test_a_source_that_was_edited_is_read_again(tmp_path, gpt2):
    """ Though its rows, of an interrupted run, are in the cache under parts.tmp. """
    path = tmp_path / 'a.jsonl'
    for n, text in enumerate(('one', 'two')):
        path.write_text(json.dumps({'text': text}))
        os.utime(path, (n, n))
        assert list(texts.each(texts.load_rows(tmp_path, path, ''))) == [text]


def test_a_vocabulary_that_is_too_large_is_noticed_first(tmp_path):
    with pytest.raises(ValueError, match='65,536'):
        texts.write_bins(tmp_path, {'train': ['a']}, {'kind': 'char', 'itos': list(range(65_537))}, 1)


def test_another_tokenizer_replaces_everything(tmp_path, gpt2):
    """ Neither its finished batches nor its bins nor its meta.pkl are mixed with the new ones. """
    record = {'kind': 'char', 'itos': ['a', 'b']}
    texts.write_bins(tmp_path, {split: ['ab'] for split in ('train', 'val', 'test')}, record, 2)
    other = {'kind': 'char', 'itos': ['b', 'a']}
    texts.write_bins(tmp_path, {split: ['ab'] for split in ('train', 'val')}, other, 2)
    assert read(tmp_path, 'train') == [1, 0] and not (tmp_path / 'test.bin').exists()
    assert pickle.loads((tmp_path / 'meta.pkl').read_bytes())['stoi'] == {'b': 0, 'a': 1}
    texts.write_bins(tmp_path, {'train': ['ab'], 'val': ['ab']}, {'kind': 'gpt2'}, 2)
    assert read(tmp_path, 'val') == gpt2.encode_ordinary('ab') and not (tmp_path / 'meta.pkl').exists()


def test_special_tokens_in_a_text_are_letters(tmp_path, gpt2):
    texts.write_bins(tmp_path, {'train': ['<|endoftext|>', None]}, {'kind': 'gpt2'}, 10)
    assert read(tmp_path, 'train') == gpt2.encode_ordinary('<|endoftext|>') + [50256]
    assert bins.get_tokenizer({'kind': 'gpt2'})[0]('<|endoftext|>', special=True).tolist() == [50256]


def test_a_tokenizer_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    def fail(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '/the/cache')
    with pytest.raises(OSError, match='vocab.bpe.*ConnectionError.*/the/cache.*python_char'):
        texts.write_bins(tmp_path, {'train': ['a']}, {'kind': 'gpt2'}, 1)
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# the scripts

def test_prepare_shakespeare(clone, gpt2):
    text = 'First Citizen:\n\nSpeak, speak the speech.\n' * 50
    for name in ('shakespeare', 'shakespeare_char'):
        (clone / f'data/{name}/input.txt').write_text(text)
    cut = int(len(text) * 0.9)
    prepare(clone / 'data/shakespeare')
    assert read(clone / 'data/shakespeare', 'train') == gpt2.encode_ordinary(text[:cut])
    assert read(clone / 'data/shakespeare', 'val') == gpt2.encode_ordinary(text[cut:])
    out = prepare(clone / 'data/shakespeare_char')
    meta = pickle.loads((clone / 'data/shakespeare_char/meta.pkl').read_bytes())
    assert ''.join(meta['itos'][i] for i in read(clone / 'data/shakespeare_char', 'train')) == text[:cut]
    assert f'vocabulary: {len(set(text))} characters' in out


@pytest.mark.parametrize('word', ['THE', 'THIS'])
def test_prepare_holmes_cuts_off_what_is_gutenbergs(clone, word):
    story = 'To Sherlock Holmes she is always THE woman.\n\nI have seldom heard him mention her.\n'
    text = ('\ufeffProject Gutenberg header, licence\n'
            f'*** START OF {word} PROJECT GUTENBERG EBOOK A\nTITLE ***\n\n'
            f'Produced by a volunteer\nand another\n\n\n{story}\n\n'
            'End of the Project Gutenberg EBook of A Title\n'
            f'*** END OF {word} PROJECT GUTENBERG EBOOK A TITLE ***\nTHE FULL PROJECT GUTENBERG LICENSE\n')
    folder = clone / 'data/holmes'
    (folder / 'input.txt').write_bytes(text.replace('\n', '\r\n').encode())
    prepare(folder)
    itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
    assert ''.join(itos[i] for i in read(folder, 'train') + read(folder, 'val')) == story


def test_prepare_python_char(clone):
    folder = clone / 'data/python_char'
    out = prepare(folder)
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == 96 and meta['itos'][0] == '\n' and meta['itos'][95] == '~'
    ids = read(folder, 'train')
    import __future__
    head = ''.join(meta['itos'][i] for i in ids[:3000])
    assert head == open(__future__.__file__).read()[:3000]  # the first by path
    assert 5e6 < len(ids) < 12e6 and 'SHA-256' in out


def test_prepare_wikitext2(clone, tmp_path, gpt2):
    rows = {split: prose(3000, seed).splitlines(keepends=True) + ['']
            for seed, split in enumerate(['train', 'validation', 'test'])}
    source = tmp_path / 'source'
    source.mkdir()
    for split in rows:
        pq.write_table(pa.table({'text': rows[split]}), source / f'{split}-00000-of-00001.parquet')
    folder = clone / 'data/wikitext2'
    prepare(folder, f'--source={source}')
    for split, name in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        assert read(folder, name) == [i for row in rows[split] for i in gpt2.encode_ordinary(row)]
    (source / 'test-00000-of-00001.parquet').unlink()
    assert 'no test*.parquet or test*.jsonl' in prepare(folder, f'--source={source}', code=1)
    assert '--source=FOLDER' in prepare(folder, code=1)  # no network


def test_prepare_openwebtext_in_many_processes(clone, tmp_path, gpt2):
    import datasets
    documents = [prose(n, n) for n in np.random.default_rng(0).integers(10, 20_000, size=700).tolist()]
    source = tmp_path / 'source'
    source.mkdir()
    for i in range(2):
        (source / f'{i}.jsonl').write_text('\n'.join(
            json.dumps({'text': document}) for document in documents[i * 350:i * 350 + 350]))
    folder = clone / 'data/openwebtext'
    out = prepare(folder, f'--source={source}')
    assert 'documents: 700' in out and 'WARNING' in out
    parts = datasets.Dataset.from_dict({'text': documents}).train_test_split(0.0005, seed=2357)
    for split, name in (('train', 'train'), ('test', 'val')):
        expected = [i for text in parts[split]['text'] for i in gpt2.encode_ordinary(text) + [50256]]
        assert read(folder, name) == expected


def test_prepare_bookcorpus(clone, tmp_path, gpt2):
    rows = [f'the cat sat {i} .' for i in range(130_000)]  # 65 are to be held out: 32 runs of two
    pq.write_table(pa.table({'text': rows}), tmp_path / 'a.parquet')
    folder = clone / 'data/bookcorpus'
    prepare(folder, f'--source={tmp_path}/a.parquet')
    runs = np.random.default_rng(2357).choice(65_000, 32, replace=False).tolist()
    held_out = {2 * run + i for run in runs for i in (0, 1)}
    for split in ('train', 'val'):
        assert read(folder, split) == [i for n, row in enumerate(rows) if (n in held_out) == (split == 'val')
                                       for i in gpt2.encode_ordinary(row) + gpt2.encode_ordinary('\n')]


def test_killed_and_run_again(tmp_path, gpt2):
    """ kill -9 of the script alone: its workers end with it, no bin is there, finished batches are kept. """
    text = prose(12_000_000)
    (tmp_path / 'a.txt').write_text(text)
    folder = tmp_path / 'bins'
    command = [sys.executable, ROOT / 'data/custom/prepare.py', '--source=a.txt', f'--name={folder}']

    def processes():
        """ {process: its parent}, without those that have ended and wait to be noticed. """
        lines = subprocess.run(['ps', '-eo', 'pid,ppid,stat'], capture_output=True, text=True).stdout
        rows = [line.split() for line in lines.splitlines()]
        return {pid: parent for pid, parent, state in rows if not state.startswith('Z')}

    started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (finished := list(folder.glob('parts.tmp/train-000000-????????????????'))):
        assert started.poll() is None
        time.sleep(0.01)
    workers = {pid for pid, parent in processes().items() if parent == str(started.pid)}
    started.send_signal(signal.SIGKILL)
    started.wait()
    time.sleep(1)
    assert workers and not workers & set(processes())
    assert [path.name for path in folder.iterdir()] == ['parts.tmp']
    kept = np.fromfile(finished[0], dtype='<u2').size
    finished[0].write_bytes(bytes(2 * kept))  # marks what the next run takes up
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    cut = int(len(text) * 0.9)
    assert read(folder, 'train') == [0] * kept + gpt2.encode_ordinary(text[:cut])[kept:]
    assert read(folder, 'val') == gpt2.encode_ordinary(text[cut:]) + [50256]
    assert sorted(path.name for path in folder.iterdir()) == ['train.bin', 'val.bin']


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_ctrl_c_twice(tmp_path, gpt2):
    """ One line, no traceback of a worker, what is done stays; and the same command goes on. """
    (tmp_path / 'a.txt').write_text(prose(12_000_000))
    command = [sys.executable, ROOT / 'data/custom/prepare.py', '--source=a.txt', f'--name={tmp_path}/bins']
    started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, start_new_session=True,  # a shell's background job ignores it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.glob('bins/parts.tmp/train-000000-????????????????')):
        assert started.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(started.pid, signal.SIGINT)
        time.sleep(0.05)
    _, error = started.communicate(timeout=30)
    assert started.returncode == 1 and error.splitlines()[-1].startswith('prepare.py: interrupted.')
    assert 'Traceback' not in error and list(tmp_path.glob('bins/parts.tmp/train-*'))
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert 'from an interrupted run' in out and not (tmp_path / 'bins/parts.tmp').exists()


def test_one_preparation_at_a_time(tmp_path):
    scratch = tmp_path / 'bins/parts.tmp'
    scratch.mkdir(parents=True)
    lock = f"import fcntl; file = open('{scratch}/process', 'w'); fcntl.flock(file, 2); print(1, flush=True)"
    other = subprocess.Popen([sys.executable, '-c', f'{lock}; input()'], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    (tmp_path / 'a.txt').write_text('some text')
    settings = dict(source='a.txt', name=tmp_path / 'bins', tokenizer='char')
    _, error = run('data/custom/prepare.py', cwd=tmp_path, code=1, **settings)
    assert 'another process is preparing' in error and (scratch / 'process').exists()
    other.communicate(b'')
    run('data/custom/prepare.py', cwd=tmp_path, **settings)


def test_a_retired_loading_script_is_not_the_end(tmp_path, monkeypatch, gpt2):
    import datasets

    def load_dataset(name, config, split, revision=None):
        if revision is None:
            raise RuntimeError(f'Dataset scripts are no longer supported, but found {name}.py')
        return name, config, split, revision
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert texts.load_rows(tmp_path, '', 'a/b') == ('a/b', None, 'train', 'refs/convert/parquet')


def test_custom_trained_and_sampled(tmp_path):
    """ Documents from files of three kinds, in a Hugging Face tokenizer that travels with the model. """
    import tokenizers
    import transformers
    documents = [f'the cat {i} sat on a mat.\n' * 20 for i in range(20)]
    documents[3] += '<eos>'  # letters
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'a.txt').write_text(documents[0])
    pq.write_table(pa.table({'text': documents[1:10]}), source / 'b.parquet')
    (source / 'c.jsonl').write_text('\n'.join(json.dumps({'text': document}) for document in documents[10:]))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(documents, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<eos>'], initial_alphabet=bpe.pre_tokenizer.alphabet()))
    bpe.enable_truncation(16)  # as those of many models are saved
    bpe.enable_padding(length=32)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<eos>')
    hf.save_pretrained(tmp_path / 'hf')
    bpe.no_truncation()
    bpe.no_padding()
    bpe.encode_special_tokens = True
    folder = tmp_path / 'bins'
    out, _ = run('data/custom/prepare.py', cwd=tmp_path, source='source', name=folder, tokenizer='hf',
                 val_fraction=0.2)
    assert '3 files, 20 documents' in out
    held_out = set(np.random.default_rng(2357).permutation(20)[:4].tolist())
    for split in ('train', 'val'):
        expected = [i for n, document in enumerate(documents) if (n in held_out) == (split == 'val')
                    for i in bpe.encode(document).ids + [bpe.token_to_id('<eos>')]]
        assert read(folder, split) == expected
    shutil.rmtree(tmp_path / 'hf')
    train(tmp_path, folder, max_iters=200, lr_decay_iters=200, eval_interval=0)
    shutil.rmtree(folder)
    out, _ = run('sample.py', cwd=tmp_path, start='the cat', num_samples=1, max_new_tokens=40)
    assert 'the cat' in out and ' sat on' in out


@pytest.mark.parametrize('kind, message', [
    ('BPE', 'the tokenizer has no token for'), ('WordLevel', 'no tokens for')])
def test_a_tokenizer_without_a_token_for_a_character(tmp_path, kind, message):
    import tokenizers
    import transformers
    vocabulary = {'a': 0, 'b': 1, '\n': 2}
    model = getattr(tokenizers.models, kind)
    tokenizer = tokenizers.Tokenizer(model(vocabulary, []) if kind == 'BPE' else model(vocabulary))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / 'hf')
    (tmp_path / 'a.txt').write_text('ab\nab\xe9\n')
    _, error = run('data/custom/prepare.py', cwd=tmp_path, source='a.txt', name=tmp_path / 'bins',
                   tokenizer='hf', code=1)
    assert f"{message} '\xe9'" in error.splitlines()[-1] and 'Traceback' not in error
    assert kind != 'BPE' or 'a.txt, line 2: ' in error
    assert not (tmp_path / 'bins').exists()


CHARS, OTHERS = ({'kind': 'char', 'itos': itos} for itos in (['a', 'b'], ['b', 'a']))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('before, after', [(None, CHARS), (CHARS, OTHERS), (CHARS, {'kind': 'gpt2'}),
                                           ({'kind': 'gpt2'}, CHARS)], ids=str)
def test_killed_while_files_get_their_names(tmp_path, gpt2, before, after):
    """ At no moment are there bins beside another vocabulary than theirs. """
    splits = {'train': ['abba', None], 'val': ['bab', None]}
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        (folder / 'pytorch_model.bin').write_text('not ours')
        if before:
            texts.write_bins(folder, splits, before, 10)
        if (pid := os.fork()) == 0:
            left = iter(range(moment, -1, -1))
            for name in 'replace', 'unlink':
                def act(*args, act=getattr(os, name), **named):
                    return act(*args, **named) if next(left) else os._exit(9)
                setattr(os, name, act)
            try:
                texts.write_bins(folder, splits, after, 10)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        there = [name for name in splits if (folder / f'{name}.bin').exists()]
        record = bins.tokenizer_record(bins.load_meta(folder))
        assert record in (before, after) or not there
        for name in there:
            encode, _, _, end = texts.get_tokenizer(record)
            assert read(folder, name) == [*encode(splits[name][0]), *([] if end is None else [end])]
        assert (folder / 'pytorch_model.bin').exists()
        if status == 0:
            break
    assert 6 < moment and len(there) == 2 and record == after


def test_an_error_leaves_what_an_earlier_run_left(tmp_path):
    (tmp_path / 'bins/parts.tmp').mkdir(parents=True)
    (tmp_path / 'bins/parts.tmp/train-000000-x').write_text('')
    _, error = run('data/custom/prepare.py', cwd=tmp_path, source='nowhere', name=tmp_path / 'bins', code=1)
    assert 'nowhere is not there' in error and len(list(tmp_path.glob('bins/parts.tmp/*'))) == 1


def test_gpt2_tokens_trained_and_sampled(tmp_path, gpt2, script_globals):
    """ One document: cut by its characters, with one end-of-text. """
    text = prose(5000)
    (tmp_path / 'mine').write_text(text)
    folder = tmp_path / 'bins'
    run('data/custom/prepare.py', cwd=tmp_path, source='mine', name=folder, val_fraction=0.2)
    assert read(folder, 'train') == gpt2.encode_ordinary(text[:int(0.8 * len(text))])
    assert read(folder, 'val') == gpt2.encode_ordinary(text[int(0.8 * len(text)):]) + [50256]
    train(tmp_path, folder, max_iters=2)
    out, _ = run('sample.py', cwd=tmp_path, start='the<|endoftext|>', num_samples=1, max_new_tokens=5, seed=1)
    assert 'the<|endoftext|>' in out
    names = script_globals('sample.py', start='the<|endoftext|>', num_samples=1, max_new_tokens=1)
    assert names['prompts'] == [[*gpt2.encode_ordinary('the'), 50256]]

    from transformers import AutoTokenizer
    run('export.py', cwd=tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path / 'out/hf')
    assert exported.encode(text + '<|endoftext|>') == [*gpt2.encode_ordinary(text), 50256]


def test_eval_split(tmp_path, dataset):
    """ Another split than val is evaluated, the whole of it. """
    folder = tmp_path / 'three'
    shutil.copytree(dataset, folder)
    _, steps, _ = train(tmp_path, folder, max_iters=5, eval_iters=-1)
    shutil.move(folder / 'val.bin', folder / 'test.bin')
    settings = dict(init_from='resume', eval_iters=-1, eval_split='test', eval_only=True)
    out, _ = run('train.py', cwd=tmp_path, **{**SMALL, 'dataset': folder, **settings})
    assert f'train loss {steps[5][0]:.4f}, test loss {steps[5][1]:.4f}' in out
