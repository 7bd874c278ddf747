""" Texts from downloads, files and rows: complete, in order, and an error names the place. """
import http.server
import json
import os
import threading
from hashlib import sha256

import pyarrow
import pyarrow.parquet
import pytest
from fake_gpt2 import prose

from components import text_sources
from components.errors import UserError
from components.text_sources import (
    END_OF_DOCUMENT,
    count_texts,
    download,
    find_files,
    group_by_split,
    load_rows,
    read_text,
    read_texts,
    texts_of_rows,
)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': text, 'x': [1]}) + '\n\n' for text in texts))

# -----------------------------------------------------------------------------
# download

TEXT = b'x' * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """ Announces TEXT, of which /half sends 400 bytes. """

    def do_GET(self):
        self.send_response(404 if self.path == '/missing' else 200)
        self.send_header('Content-Length', str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT[:400] if self.path == '/half' else TEXT)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('digest', [None, sha256(TEXT).hexdigest()])
def test_download(tmp_path, url, digest):
    path = tmp_path / 'input.txt'
    download(f'{url}/all', path, digest)
    assert path.read_bytes() == TEXT
    path.write_text('my own')
    download(f'{url}/missing', path, digest)
    assert path.read_text() == 'my own'


@pytest.mark.parametrize('name, digest, message', [
    pytest.param('half', None, '400 bytes read, 600 more', id='connection lost'),
    pytest.param('missing', None, '404', id='not found'),
    pytest.param('all', 64 * '0', 'not the expected text', id='other content'),
])
def test_download_that_fails_creates_no_file(tmp_path, url, name, digest, message):
    with pytest.raises(OSError, match=f'{message}.*save that text as .*input.txt'):
        download(f'{url}/{name}', tmp_path / 'input.txt', digest)
    assert not list(tmp_path.iterdir())

# -----------------------------------------------------------------------------
# files


@pytest.fixture
def folder(tmp_path):
    """ A folder with files of several kinds, a subfolder, hidden files and links. """
    folder = tmp_path / 'in'
    for path in ('b.txt', 'a.JSONL', 'sub/c.txt', 'sub/b.txt', 'd.md', '.e.txt', '.git/f.txt'):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('text')
    (folder / 'link').symlink_to(tmp_path)
    (folder / 'broken.txt').symlink_to(tmp_path / 'nowhere')
    return folder


@pytest.mark.parametrize('source, suffixes, prefix, expected', [
    ('.', ('.txt', '.jsonl'), '', ['a.JSONL', 'b.txt', 'sub/b.txt', 'sub/c.txt']),
    ('.', ('.txt', '.jsonl'), 'b', ['b.txt']),
    ('a.JSONL', ('.jsonl', '.parquet'), '', ['a.JSONL']),
])
def test_find_files(folder, source, suffixes, prefix, expected):
    assert find_files(folder / source, suffixes, prefix) == [folder / name for name in expected]


def test_find_files_lists_what_it_skips(folder, capsys):
    (folder / 'LICENSE').write_text('text')
    find_files(folder, ('.jsonl',))
    out = capsys.readouterr().out
    assert out.startswith('skipped files: 4 .txt, 1 ')
    assert ', 1 .md' in out
    assert ', 1 without a suffix' in out


@pytest.mark.parametrize('train, val, test', [
    ('train.txt', 'valid.txt', ''),
    ('train.txt', 'val.txt', 'test.txt'),
    ('train-0.parquet train-1.parquet', 'validation-0.parquet', 'test-0.parquet'),
    ('foo.train.txt', 'foo.dev.txt', ''),
    ('wiki.train.tokens', 'wiki.valid.tokens', 'wiki.test.tokens'),
    ('TRAIN.TXT a.txt', 'Valid.txt', ''),
    ('train/a.txt train/test-b.txt', 'dev/a.txt', 'a/test.txt'),
    ('x_training_1.txt', '', 'x_test_1.txt'),
    ('train.txt contest.txt devices.txt train_valid.txt', '', ''),
    ('val.txt test.txt', '', ''),
    ('train.txt readme.txt', 'valid.txt', ''),
    ('trainData.txt', 'valData.txt', 'TESTData.txt'),
    ('train.txt', 'eval.txt evaluation.txt holdout.txt heldout.txt', ''),
    ('train.py b.py test_a.py test_b.py', '', ''),
    ('train/a.py', '', 'test/train.py'),
    ('train.txt a.txt b.txt test.txt', '', ''),
    ('train.py training/c.py', '', ''),
])
def test_group_by_split(tmp_path, train, val, test):
    expected = {}
    for split, names in (('train', train), ('val', val), ('test', test)):
        if names:
            expected[split] = [tmp_path / 'test' / name for name in names.split()]
    paths = sorted(path for group in expected.values() for path in group)
    expected = {split: sorted(group) for split, group in expected.items()}
    assert group_by_split(paths, tmp_path / 'test') == expected


@pytest.mark.parametrize('source, suffixes, prefix, message', [
    ('.', ('.txt',), 'c', r'no c\*\.txt'),
    ('d.md', ('.jsonl', '.parquet'), '', r'd\.md: no \*\.jsonl or \*\.parquet.*--suffixes=\.md$'),
    ('nowhere', ('.txt',), '', 'nowhere does not exist'),
])
def test_find_files_refuses(folder, source, suffixes, prefix, message):
    with pytest.raises(UserError, match=message):
        find_files(folder / source, suffixes, prefix)


@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() == 0, reason='root may read all')
def test_find_files_in_unreadable_folder(folder):
    (folder / 'sub').chmod(0)
    with pytest.raises(PermissionError):
        find_files(folder, ('.txt',))
    (folder / 'sub').chmod(0o700)


def test_read_rows(tmp_path):
    rows = ['one\n', '', 'tw\u00f6 <|endoftext|>']
    write_jsonl(tmp_path / 'b.jsonl', rows)
    write_parquet(tmp_path / 'a.parquet', n=[1, 2, 3], text=rows)
    expected = [rows[0], END_OF_DOCUMENT, rows[1], END_OF_DOCUMENT, rows[2], END_OF_DOCUMENT]
    assert list(read_texts(tmp_path / 'b.jsonl')) == expected
    assert list(read_texts(tmp_path / 'a.parquet')) == expected


@pytest.mark.parametrize('name, content', [
    ('a.json', b' [{"n": 1, "body": "one"},\n"t\xc3\xb6"]'),
    ('a.json', b'\xef\xbb\xbf{"n": 1, "body": "one"}\n\n"t\xc3\xb6"\n'),
    ('a.ndjson', b'{"n": 1, "body": "one"}\n{"body": "t\\u00f6"}'),
    ('a.csv', b'\xef\xbb\xbfn,body\r\n1,one\r\n2,"t\xc3\xb6"\r\n'),
    ('a.TSV', b'body\tn\none\t1\nt\xc3\xb6\t2\n'),
    ('a.csv', b'\xef\xbb\xbfn;body\r\n"1,5";one\r\n2;"t\xc3\xb6"\r\n'),
    ('a.csv', b'body\tn\none\t1\nt\xc3\xb6\t2\n'),
])
def test_read_rows_with_a_key(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    texts = list(read_texts(tmp_path / name, key='body'))
    assert texts == ['one', END_OF_DOCUMENT, 't\u00f6', END_OF_DOCUMENT]


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
@pytest.mark.parametrize('text, longest', [
    pytest.param('acgt' * 5000, 1000, id='DNA'),
    pytest.param('one\n' + 'acgt' * 5000, 2000, id='DNA after a line'),
    pytest.param('a,b "c" ' * 2500, 1000, id='words on one line'),
])
def test_one_long_line_comes_in_pieces(tmp_path, monkeypatch, name, text, longest):
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', 1000)
    path = tmp_path / name
    path.write_text(text if name == 'a.txt' else json.dumps({'text': text}))
    pieces = list(read_texts(path))
    assert pieces.pop() is END_OF_DOCUMENT
    assert ''.join(pieces) == text
    assert max(map(len, pieces)) <= longest


@pytest.mark.parametrize('content, expected', [
    (b'\xef\xbb\xbfHello\r\nworld.\r\r\n', ['Hello\nworld.\n\n', END_OF_DOCUMENT]),
    (b'', []),
])
def test_read_short_text(tmp_path, content, expected):
    path = tmp_path / 'a.txt'
    path.write_bytes(content)
    assert list(read_texts(path)) == expected
    assert read_text(path) == ''.join(expected[:-1])


@pytest.mark.parametrize('text', [
    pytest.param(prose(20_000), id='prose'),
    pytest.param(' the cat ! \n\n  \n' * 1000, id='white space at the end of lines'),
    pytest.param('x\n' + '\n' * 5000 + 'y', id='long white space'),
    pytest.param(prose(20_000).replace('\n', ' '), id='one line'),
])
def test_pieces_of_long_text_have_the_same_tokens(tmp_path, monkeypatch, gpt2, text):
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', 1000)
    path = tmp_path / 'a.txt'
    path.write_text(text)
    pieces = list(read_texts(path))
    assert pieces.pop() is END_OF_DOCUMENT
    assert len(pieces) > 1
    assert max(len(piece) for piece in pieces) < 2000 or '\n' * 5000 in text
    assert ''.join(pieces) == text
    ids = [i for piece in pieces for i in gpt2.encode_ordinary(piece)]
    assert ids == gpt2.encode_ordinary(text)


@pytest.mark.parametrize('name, content, message', [
    pytest.param('a.txt', b'one\n' * 9999 + b'thr\xe9e\n', 'line 10000: not in UTF', id='latin-1'),
    pytest.param('a.jsonl', b'{"text": "a"}\n{"text": "b"\n', 'row 2: Expecting', id='cut off'),
    pytest.param('a.jsonl', b'{"text": "a"}\n\n{"b": "b"}\n', 'row 2: no key', id='no text'),
    pytest.param('a.jsonl', b'{"text": 3}\n', 'row 1: 3 is not a text', id='number in jsonl'),
    pytest.param('a.jsonl', b'[1]\n', 'row 1: .1. is not a text', id='list'),
    pytest.param('a.json', b'["a", {"b": "c", "d": 1}]',
                 "row 2: no key 'text', only 'b', 'd'; .* --key=", id='other key'),
    pytest.param('a.json', b'[ "a", ', 'row 1: Expecting', id='cut off list'),
    pytest.param('a.json', b'{\n "data": [\n  {"text": "a"}\n ]\n}',
                 'row 1: Expecting.*; write each row on a line, or all as a list', id='indented'),
    pytest.param('a.jsonl', b'{"text": "a"}\n{"text": null}\n',
                 'row 2: None is not a text; remove that row', id='null in jsonl'),
    pytest.param('a.csv', b'id,text\n1\n', 'row 1: None is not a text; remove', id='short line'),
    pytest.param('a.csv', 'text\na\n'.encode('utf-16'), 'line 1: not in UTF-8; save it as UTF-8',
                 id='csv in UTF-16'),
    pytest.param('a.csv', b'text\na, b\n', 'row 1: it has more fields', id='no quotes'),
    pytest.param('a.csv', b'text\na\n"b\nc\n', 'row 2: unexpected end', id='quote not closed'),
    pytest.param('a.tsv', b'text\n\xe9\n', 'line 2: not in UTF', id='tsv in latin-1'),
    pytest.param('a.jsonl', b'\n{"text": "\xe9"}\n', 'line 2: not in UTF', id='jsonl in latin-1'),
    pytest.param('a.jsonl', rb'{"text": "\ud800"}', "row 1: 'utf-8' codec", id='half a surrogate'),
    pytest.param('a.parquet', b'not one', 'a.parquet, row 1: ', id='not parquet'),
    pytest.param('a.parquet', {'txt': ['a']}, "no key 'text', only 'txt'", id='column'),
    pytest.param('a.parquet', {'text': ['a'] * 2500 + [None]}, 'row 2501: None', id='null'),
    pytest.param('a.parquet', {'text': [1]}, 'row 1: 1 is', id='number in parquet'),
])
def test_unreadable_file(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        write_parquet(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_texts(path))


def test_count_texts(tmp_path):
    (tmp_path / 'a.txt').write_text('abba\n')
    (tmp_path / 'b.txt').write_text('')
    write_jsonl(tmp_path / 'c.jsonl', ['c', ''])
    paths = [tmp_path / name for name in ('a.txt', 'b.txt', 'c.jsonl')]
    sizes, characters = count_texts(paths)
    assert sizes.tolist() == [5, 1, 0]
    assert characters == {'a', 'b', 'c', '\n'}

# -----------------------------------------------------------------------------
# rows


@pytest.mark.usefixtures('gpt2')
def test_load_local_rows(tmp_path):
    texts = [f'text {i}' for i in range(2500)]
    write_jsonl(tmp_path / 'a.jsonl', texts[:100])
    write_parquet(tmp_path / 'b.parquet', text=texts[100:])
    rows = load_rows(tmp_path, tmp_path, 'a/b')
    assert len(rows) == 2500
    assert list(texts_of_rows(rows)) == texts


@pytest.mark.usefixtures('gpt2')
def test_hub_dataset_with_loading_script(tmp_path, monkeypatch):
    """ datasets refuses it, and the hub's conversion to parquet is loaded instead. """
    import datasets

    def load_dataset(name, config, split, revision=None):
        if revision is None:
            raise RuntimeError(f'Dataset scripts are no longer supported, but found {name}.py')
        return name, config, split, revision

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    rows = load_rows(tmp_path, '', 'a/b')
    assert rows == ('a/b', None, 'train', 'refs/convert/parquet')


def test_rows_need_the_tokenizer_first(tmp_path, monkeypatch):
    """ A tokenizer that cannot be downloaded is an error before a long download, not after it. """
    import tiktoken

    def fail(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    with pytest.raises(OSError, match='ConnectionError.*TIKTOKEN_CACHE_DIR.*python_char'):
        load_rows(tmp_path, '', 'a/b')
