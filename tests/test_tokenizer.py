""" Tokenizers encode and decode as their references do; their records are plain data. """
import pickle
import types

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers

from components.errors import UserError
from components.tokenizer import (
    get_tokenizer,
    has_tokenizer,
    hf_record,
    load_meta,
    meta_of,
    tokenizer_record,
    tokens_of,
)

CHAR = {'kind': 'char', 'itos': ['\n', 'a', '\u00e9', '\U0001f600']}


@pytest.fixture
def hf():
    """ A word-level tokenizer whose ids have a gap, with a special token. """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, 'b': 7}))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(['<end>'])
    return tokenizer


def record_of(hf):
    return {'kind': 'hf', 'json': hf.to_str(), 'end': hf.token_to_id('<end>')}

# -----------------------------------------------------------------------------
# tokenizers


def test_char_tokenizer():
    tokenizer = get_tokenizer(CHAR)
    assert tokenizer.encode('a\n\u00e9\U0001f600') == [1, 0, 2, 3]
    assert tokenizer.decode([1, 0, 2, 3]) == 'a\n\u00e9\U0001f600'
    assert tokenizer.vocab_size == 4
    assert tokenizer.end_of_text is None


def test_char_tokenizer_unknown_character():
    with pytest.raises(UserError, match="'xy' is not in the vocabulary"):
        get_tokenizer(CHAR).encode('ayxa')


def test_gpt2_tokenizer(gpt2):
    tokenizer = get_tokenizer({'kind': 'gpt2'})
    text = "the cat\n\nit's \u00e9t\u00e9 42!"
    assert tokenizer.encode(text) == gpt2.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 50257
    assert tokenizer.end_of_text == 50256


def test_gpt2_special_token(gpt2):
    tokenizer = get_tokenizer({'kind': 'gpt2'})
    assert tokenizer.encode('<|endoftext|>', special=True) == [50256]
    assert tokenizer.encode('<|endoftext|>') == gpt2.encode_ordinary('<|endoftext|>')
    assert tokenizer.decode([50256]) == '<|endoftext|>'


def test_gpt2_tokenizer_without_network(monkeypatch):
    def fail(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '/the/cache')
    with pytest.raises(OSError, match='vocab.bpe.*ConnectionError.*/the/cache.*python_char'):
        get_tokenizer({'kind': 'gpt2'})


def test_hugging_face_vocab_size_with_gap(hf):
    assert get_tokenizer(record_of(hf)).vocab_size == 8  # the ids 0, 2 and 7


def test_hugging_face_special_token(hf):
    tokenizer = get_tokenizer(record_of(hf))
    assert tokenizer.end_of_text == 2
    assert tokenizer.encode('<end>', special=True) == [2]
    assert tokenizer.decode([0, 2, 7]) == 'a<end>b'


def test_hugging_face_unknown_character(hf):
    with pytest.raises(UserError, match="no tokens for 'x'"):
        get_tokenizer(record_of(hf)).encode('x')


def test_hugging_face_truncation_and_padding_are_off(hf):
    hf.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf.enable_truncation(2)
    hf.enable_padding(length=4, pad_token='a', pad_id=0)
    tokenizer = get_tokenizer(record_of(hf))
    assert tokenizer.encode('a b b') == [0, 7, 7]
    assert tokenizer.encode('b') == [7]

# -----------------------------------------------------------------------------
# records


def test_hf_record_of_directory(hf, tmp_path):
    assert not has_tokenizer(tmp_path)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, eos_token='<end>')
    saved.save_pretrained(tmp_path)
    assert has_tokenizer(tmp_path)
    record = hf_record(str(tmp_path))
    assert record['end'] == 2
    assert get_tokenizer(record).encode('<end>', special=True) == [2]


def test_hf_record_of_empty_directory(tmp_path):
    with pytest.raises(UserError, match='no tokenizer'):
        hf_record(str(tmp_path))


def test_tokens_of_records(hf):
    assert tokens_of(CHAR) == {'\n': 0, 'a': 1, '\u00e9': 2, '\U0001f600': 3}
    assert tokens_of(record_of(hf)) == {'a': 0, 'b': 7}
    assert tokens_of({'kind': 'gpt2'}) is None
    assert tokens_of(None) is None

# -----------------------------------------------------------------------------
# meta.pkl


def save_meta(folder, meta):
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def test_meta_format_of_characters():
    meta = meta_of(CHAR, 4)
    assert list(meta) == ['vocab_size', 'stoi', 'itos']
    assert meta['vocab_size'] == 4
    assert meta['stoi'] == {'\n': 0, 'a': 1, '\u00e9': 2, '\U0001f600': 3}
    assert meta['itos'] == {0: '\n', 1: 'a', 2: '\u00e9', 3: '\U0001f600'}


def test_meta_round_trip(hf, tmp_path):
    for record in (CHAR, record_of(hf)):
        save_meta(tmp_path, meta_of(record, 9))
        meta = load_meta(tmp_path)
        assert meta['vocab_size'] == 9
        assert tokenizer_record(meta) == record


def test_meta_of_gpt2_is_absent(tmp_path):
    assert meta_of({'kind': 'gpt2'}, 50257) is None
    assert load_meta(tmp_path) is None
    assert tokenizer_record(None) == {'kind': 'gpt2'}


def test_meta_itos_may_be_a_list(tmp_path):
    save_meta(tmp_path, {'vocab_size': 4, 'itos': ['a', 'b']})  # of a padded vocabulary
    assert tokenizer_record(load_meta(tmp_path)) == {'kind': 'char', 'itos': ['a', 'b']}


def test_meta_with_vocab_size_alone(tmp_path):
    save_meta(tmp_path, {'vocab_size': 300})
    assert tokenizer_record(load_meta(tmp_path)) is None


@pytest.mark.parametrize('meta, message', [
    pytest.param({'vocab_size': np.int64(3)}, 'contains code', id='numpy number'),
    pytest.param({'vocab_size': 3, 'itos': types.SimpleNamespace()}, 'contains code', id='class'),
    pytest.param({'vocab_size': 2**16 + 1}, 'uint16', id='too large'),
    pytest.param({'vocab_size': 0}, 'vocab_size=0', id='empty'),
    pytest.param({'vocab_size': 'x'}, "vocab_size='x'", id='not a number'),
    pytest.param({'itos': ['a']}, 'KeyError', id='no vocab_size'),
    pytest.param({'vocab_size': 1, 'itos': [b'a']}, 'other than text', id='bytes'),
    pytest.param({'vocab_size': 2, 'itos': {0: 'a', 2: 'b'}}, 'KeyError', id='gap'),
    pytest.param({'vocab_size': 1, 'tokenizer': {'kind': 'gpt2'}}, "kind 'gpt2'", id='kind'),
    pytest.param({'vocab_size': 1, 'tokenizer': {'kind': 'hf', 'json': '{', 'end': 0}},
                 'not a vocabulary', id='damaged tokenizer.json'),
    pytest.param(['a'], 'not a vocabulary', id='list'),
])
def test_meta_is_refused(tmp_path, meta, message):
    save_meta(tmp_path, meta)
    with pytest.raises(UserError, match=message) as caught:
        load_meta(tmp_path)
    assert 'meta.pkl' in str(caught.value)


@pytest.mark.parametrize('size', [0, 10])
def test_meta_is_truncated(tmp_path, size):
    content = pickle.dumps({'vocab_size': 3, 'itos': ['a', 'b', 'c']})
    (tmp_path / 'meta.pkl').write_bytes(content[:size])
    with pytest.raises(UserError, match='not a vocabulary'):
        load_meta(tmp_path)


class Bomb:
    """ Whatever runs the code in its pickle creates a file. """

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_meta_runs_no_code(tmp_path):
    save_meta(tmp_path, {'vocab_size': 3, 'itos': Bomb(tmp_path / 'boom')})
    with pytest.raises(UserError, match='contains code'):
        load_meta(tmp_path)
    assert not (tmp_path / 'boom').exists()
