""" Texts from downloads, files and rows: complete, in order, and an error names the place. """
import http.server
import json
import os
import threading
import urllib.request
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


def test_download_with_digest(tmp_path):
    source = tmp_path / 'source.txt'
    source.write_text('To be, or not to be')
    path = tmp_path / 'input.txt'
    digest = sha256(source.read_bytes()).hexdigest()
    download(source.as_uri(), path, digest)
    assert path.read_text() == 'To be, or not to be'


def test_download_of_other_content(tmp_path):
    source = tmp_path / 'source.txt'
    source.write_text('To be, or not to be')
    path = tmp_path / 'input.txt'
    with pytest.raises(OSError, match=r'not the expected text.*input\.txt.*python_char'):
        download(source.as_uri(), path, digest=64 * '0')
    assert not path.exists()


def test_download_of_missing_file(tmp_path):
    path = tmp_path / 'input.txt'
    with pytest.raises(OSError, match=r'Save that text as .*input\.txt.*python_char'):
        download((tmp_path / 'missing').as_uri(), path)
    assert not path.exists()


def test_download_keeps_existing_file(tmp_path, monkeypatch):
    path = tmp_path / 'input.txt'
    path.write_text('my own')
    monkeypatch.setattr(urllib.request, 'urlopen', None)
    download('http://nowhere', path, digest=64 * '0')
    assert path.read_text() == 'my own'


class Handler(http.server.BaseHTTPRequestHandler):
    """ Announces 1000 bytes, of which /half sends 400. """

    def do_GET(self):
        if self.path == '/missing':
            self.send_response(404)
        else:
            self.send_response(200)
        self.send_header('Content-Length', '1000')
        self.end_headers()
        if self.path == '/half':
            self.wfile.write(b'x' * 400)
        else:
            self.wfile.write(b'x' * 1000)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('name, message', [
    pytest.param('half', '400 bytes read, 600 more', id='connection lost'),
    pytest.param('missing', '404', id='not found'),
])
def test_download_that_fails_creates_no_file(tmp_path, url, name, message):
    with pytest.raises(OSError, match=message):
        download(f'{url}/{name}', tmp_path / 'input.txt')
    assert not list(tmp_path.iterdir())


def test_download_by_http(tmp_path, url):
    download(f'{url}/all', tmp_path / 'input.txt')
    assert (tmp_path / 'input.txt').read_text() == 'x' * 1000

# -----------------------------------------------------------------------------
# files


@pytest.fixture
def folder(tmp_path):
    """ A folder with files of several kinds, a subfolder, hidden files and links. """
    folder = tmp_path / 'in'
    for path in ('b.txt', 'a.JSONL', 'sub/c.txt', 'd.md', '.e.txt', '.git/f.txt'):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('text')
    (folder / 'link').symlink_to(tmp_path)
    (folder / 'broken.txt').symlink_to(tmp_path / 'nowhere')
    return folder


def test_find_files(folder, capsys):
    found = find_files(folder, ('.txt', '.jsonl'))
    assert found == [folder / 'a.JSONL', folder / 'b.txt', folder / 'sub/c.txt']
    assert '3 hidden files or files of other kinds are skipped' in capsys.readouterr().out


def test_find_files_by_prefix(folder):
    assert find_files(folder, ('.txt', '.jsonl'), prefix='b') == [folder / 'b.txt']
    with pytest.raises(UserError, match=r'no c\*\.txt'):
        find_files(folder, ('.txt',), prefix='c')


def test_find_files_of_single_file(folder):
    assert find_files(folder / 'a.JSONL', ('.jsonl', '.parquet')) == [folder / 'a.JSONL']
    assert find_files(folder / 'd.md', ('.txt',)) == [folder / 'd.md']  # a text has any name
    with pytest.raises(UserError, match=r'd\.md: no \*\.jsonl or \*\.parquet'):
        find_files(folder / 'd.md', ('.jsonl', '.parquet'))


def test_find_files_of_missing_source(tmp_path):
    with pytest.raises(UserError, match='nowhere does not exist'):
        find_files(tmp_path / 'nowhere', ('.txt',))


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


def test_read_short_text(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes(b'\xef\xbb\xbfHello\r\nworld.\r\r\n')  # with a byte order mark
    assert list(read_texts(path)) == ['Hello\nworld.\n\n', END_OF_DOCUMENT]
    assert read_text(path) == 'Hello\nworld.\n\n'


def test_read_empty_file(tmp_path):
    (tmp_path / 'a.txt').write_text('')
    assert list(read_texts(tmp_path / 'a.txt')) == []
    assert read_text(tmp_path / 'a.txt') == ''


@pytest.mark.parametrize('text', [
    pytest.param(prose(20_000), id='prose'),
    pytest.param(' the cat ! \n\n  \n' * 1000, id='white space at the end of lines'),
    pytest.param('x\n' + '\n' * 5000 + 'y', id='long white space'),
])
def test_pieces_of_long_text_have_the_same_tokens(tmp_path, monkeypatch, gpt2, text):
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', 1000)
    path = tmp_path / 'a.txt'
    path.write_text(text)
    pieces = list(read_texts(path))
    assert pieces.pop() is END_OF_DOCUMENT
    assert len(pieces) > 1
    assert ''.join(pieces) == text
    ids = [i for piece in pieces for i in gpt2.encode_ordinary(piece)]
    assert ids == gpt2.encode_ordinary(text)


def test_pieces_of_long_text_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', 1000)
    (tmp_path / 'a.txt').write_text(prose(20_000))
    pieces = list(read_texts(tmp_path / 'a.txt'))[:-1]
    assert len(pieces) > 10
    assert max(len(piece) for piece in pieces) < 2000


@pytest.mark.parametrize('name, content, message', [
    pytest.param('a.txt', b'one\ntwo\nthr\xe9e\n', 'a.txt, line 3: not in UTF-8', id='latin-1'),
    pytest.param('a.jsonl', b'{"text": "a"}\n{"text": "b"\n', 'line 2: Expecting', id='cut off'),
    pytest.param('a.jsonl', b'{"text": "a"}\n\n{"b": "b"}\n', 'line 3: no key', id='no text'),
    pytest.param('a.jsonl', b'{"text": 3}\n', 'line 1: no key', id='number in jsonl'),
    pytest.param('a.jsonl', b'[1]\n', 'line 1: no key', id='list'),
    pytest.param('a.jsonl', b'{"text": "\xe9"}\n', "line 1: 'utf-8' codec", id='jsonl in latin-1'),
    pytest.param('a.jsonl', rb'{"text": "\ud800"}', "line 1: 'utf-8' codec", id='half a surrogate'),
    pytest.param('a.parquet', b'not one', 'a.parquet: ', id='not parquet'),
    pytest.param('a.parquet', {'txt': ['a']}, "no column 'text'", id='column'),
    pytest.param('a.parquet', {'text': ['a', None]}, 'a.parquet: row 2: None', id='null'),
    pytest.param('a.parquet', {'text': [1]}, 'a.parquet: row 1: 1 is', id='number in parquet'),
])
def test_unreadable_file(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        write_parquet(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_texts(path))


def test_place_of_error_far_down(tmp_path):
    write_parquet(tmp_path / 'a.parquet', text=[*map(str, range(2500)), None])
    with pytest.raises(UserError, match='row 2501: None'):
        list(read_texts(tmp_path / 'a.parquet'))
    (tmp_path / 'a.txt').write_bytes(b'one line\n' * 30_000 + b'thr\xe9e\n')
    with pytest.raises(UserError, match='line 30001: not in UTF-8'):
        list(read_texts(tmp_path / 'a.txt'))


def test_count_texts(tmp_path):
    (tmp_path / 'a.txt').write_text('abba\n')
    (tmp_path / 'b.txt').write_text('')
    write_jsonl(tmp_path / 'c.jsonl', ['c', ''])
    stats = count_texts([tmp_path / name for name in ('a.txt', 'b.txt', 'c.jsonl')])
    assert stats.num_documents == 3
    assert stats.num_characters == 6
    assert stats.characters == {'a', 'b', 'c', '\n'}


def test_count_texts_without_text(tmp_path):
    (tmp_path / 'a.txt').write_text('')
    with pytest.raises(UserError, match='no text in .*a.txt'):
        count_texts([tmp_path / 'a.txt'])

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
def test_load_local_rows_names_bad_line(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UserError, match='a.jsonl, line 2'):
        load_rows(tmp_path, tmp_path, 'a/b')


@pytest.mark.usefixtures('gpt2')
def test_edited_local_rows_are_read_again(tmp_path):
    """ Although the cache of an interrupted run has rows of a file of the same name. """
    path = tmp_path / 'a.jsonl'
    for time, text in enumerate(('one', 'two')):
        write_jsonl(path, [text])
        os.utime(path, (time, time))
        assert list(texts_of_rows(load_rows(tmp_path, path, 'a/b'))) == [text]


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


@pytest.mark.usefixtures('gpt2')
def test_hub_without_network(tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, config, split):
        raise ConnectionError('offline')

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    with pytest.raises(OSError, match='could not load a/b .*offline.*--source=FOLDER'):
        load_rows(tmp_path, '', 'a/b')


def test_rows_need_the_tokenizer_first(tmp_path, monkeypatch):
    """ A tokenizer that cannot be downloaded is an error before a long download, not after it. """
    import tiktoken

    def fail(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    with pytest.raises(OSError, match='vocab.bpe'):
        load_rows(tmp_path, '', 'a/b')
