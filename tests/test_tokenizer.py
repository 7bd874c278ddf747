""" Tokenizers encode and decode as their references do; their specs are plain data. """
import pickle
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import tokenizers
import transformers

from components.errors import UserError
from components.tokenizer import (
    get_tokenizer,
    has_tokenizer,
    has_tokens_of,
    hf_spec,
    load_meta,
    meta_of,
    tokenizer_spec,
)

GPT2 = {'kind': 'gpt2'}
CHAR = {'kind': 'char', 'itos': ['\n', 'a', '\u00e9', '\U0001f600']}
HF = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, 'b': 7}))  # its ids have a gap
HF.decoder = tokenizers.decoders.Fuse()
HF.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
HF.add_special_tokens(['<end>'])
HF.enable_truncation(2)  # which a dataset must not inherit, nor padding
HF.enable_padding(length=4, pad_token='a', pad_id=0)
HF_RECORD = {'kind': 'hf', 'json': HF.to_str(), 'end': 2}

# -----------------------------------------------------------------------------
# tokenizers


@pytest.mark.parametrize('spec, text, ids, decoded', [
    pytest.param(CHAR, 'a\n\u00e9\U0001f600', [1, 0, 2, 3], 'a\n\u00e9\U0001f600', id='char'),
    pytest.param(HF_RECORD, 'a b b a', [0, 7, 7, 0], 'abba', id='hf'),
    pytest.param(HF_RECORD, 'b', [7], 'b', id='hf, short'),
])
def test_encode_and_decode(spec, text, ids, decoded):
    tokenizer = get_tokenizer(spec)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == decoded


def test_gpt2_tokenizer(gpt2):
    tokenizer = get_tokenizer(GPT2)
    text = "the cat\n\nit's \u00e9t\u00e9 42!<|endoftext|>"
    assert tokenizer.encode(text) == gpt2.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('spec, vocab_size, end_of_text, name', [
    pytest.param(CHAR, 4, None, None, id='char'),
    pytest.param(GPT2, 50257, 50256, '<|endoftext|>', id='gpt2'),
    pytest.param(HF_RECORD, 8, 2, '<end>', id='hf'),
])
@pytest.mark.usefixtures('gpt2')
def test_vocabulary_and_end_of_text(spec, vocab_size, end_of_text, name):
    tokenizer = get_tokenizer(spec)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.end_of_text == end_of_text
    if name is not None:
        assert tokenizer.encode(name, special=True) == [end_of_text]
        assert tokenizer.decode([end_of_text]) == name


@pytest.mark.parametrize('spec, message', [
    pytest.param(CHAR, "'xy' is not in the vocabulary", id='char'),
    pytest.param(HF_RECORD, "no tokens for 'ayxa'", id='hf'),
])
def test_character_without_a_token(spec, message):
    with pytest.raises(UserError, match=message):
        get_tokenizer(spec).encode('ayxa')

# -----------------------------------------------------------------------------
# specs


def test_hf_spec_of_directory(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UserError, match='no tokenizer'):
        hf_spec(str(tmp_path))
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=HF, eos_token='<end>')
    saved.save_pretrained(tmp_path)
    assert has_tokenizer(tmp_path)
    spec = hf_spec(str(tmp_path))
    assert spec['end'] == 2
    assert get_tokenizer(spec).encode('a <end>', special=True) == [0, 2]


@pytest.mark.parametrize('files, text, ids, end', [
    pytest.param({'vocab.txt': '[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\u6211\n\u732b\ncat\n##s\n'},
                 '\u6211\u732b Cats', [5, 6, 7, 8], 3, id='BERT'),
    pytest.param({'vocab.json': '{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}',
                  'merges.txt': '#version: 0.2\na b\n'}, 'aba<|endoftext|>', [3, 1, 0], 0,
                 id='byte-level BPE'),
    pytest.param({'vocab.json': '{"a": 0, "b": 1, "ab": 2}', 'merges.txt': 'a b\n'}, 'aba', [2, 0],
                 None, id='byte-level BPE without an end-of-text token'),
    pytest.param({'tokenizer.json': HF.to_str().replace('<end>', '</s>')}, 'a b </s>', [0, 7, 2],
                 2, id='tokenizer.json'),
])
@pytest.mark.parametrize('config', [None, '{"model_type": "gpt2"}'], ids=['alone', 'GPT-2'])
def test_hf_spec_of_a_vocabulary(tmp_path, files, text, ids, end, config):
    """ As the library tokenizers saves it; alone, or beside a GPT-2, whose class is another. """
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding='utf-8')
    if config is not None:
        (tmp_path / 'config.json').write_text(config)
    assert has_tokenizer(tmp_path)
    spec = hf_spec(str(tmp_path))
    assert spec['end'] == end
    tokenizer = get_tokenizer(spec)
    assert tokenizer.encode(text, special=True) == ids
    assert tokenizer.vocab_size <= 9  # no token was added


@pytest.mark.parametrize('names', [['spiece.model'], ['tokenizer.model'], ['vocab.json']])
def test_hf_spec_of_a_file_that_cannot_be_read(tmp_path, names):
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    for name in names:
        (tmp_path / name).write_text('{}')
    assert has_tokenizer(tmp_path)
    with pytest.raises(UserError, match='no tokenizer .* add that file .*sentencepiece'):
        hf_spec(str(tmp_path))


ABC = {'kind': 'char', 'itos': ['a', 'b', 'c']}
AB = {'kind': 'char', 'itos': ['a', 'b']}
HF_AB = {'kind': 'hf', 'json': HF.from_str(HF.to_str().replace('7', '1')).to_str(), 'end': 2}
HF_GPT2_MODEL = tokenizers.models.WordLevel({'\u0120the': 262, '<|endoftext|>': 50256})
HF_GPT2 = {'kind': 'hf', 'json': tokenizers.Tokenizer(HF_GPT2_MODEL).to_str(), 'end': 50256}


@pytest.mark.parametrize('spec, other, expected', [
    (ABC, ABC, True),
    (ABC, AB, True),
    (AB, ABC, False),
    (AB, {'kind': 'char', 'itos': ['b', 'a']}, False),
    (HF_AB, AB, True),
    (HF_RECORD, AB, False),  # other ids
    (GPT2, GPT2, True),
    (GPT2, AB, False),
    (ABC, GPT2, False),
    (GPT2, HF_GPT2, True),  # a copy from the hub
    (HF_GPT2, GPT2, True),
    (HF_RECORD, GPT2, False),
], ids=str)
def test_has_tokens_of(spec, other, expected):
    assert has_tokens_of(spec, other) == expected

# -----------------------------------------------------------------------------
# meta.pkl


def save_meta(folder, meta, protocol=None):
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta, protocol))


def test_meta_is_that_of_nanogpt():
    expected = {'vocab_size': 4, 'stoi': {'\n': 0, 'a': 1, '\u00e9': 2, '\U0001f600': 3},
                'itos': {0: '\n', 1: 'a', 2: '\u00e9', 3: '\U0001f600'}}
    assert meta_of(CHAR, 4) == expected


@pytest.mark.parametrize('meta, spec', [
    pytest.param(meta_of(CHAR, 4), CHAR, id='char'),
    pytest.param(meta_of(HF_RECORD, 8), HF_RECORD, id='hf'),
    pytest.param({'vocab_size': 9, 'itos': ['a', 'b']}, {'kind': 'char', 'itos': ['a', 'b']},
                 id='itos is a list, of a padded vocabulary'),
    pytest.param({'vocab_size': 300}, None, id='vocab_size alone'),
    pytest.param({'vocab_size': np.int64(2), 'itos': {np.int32(0): 'a', np.int32(1): np.str_('b')}},
                 {'kind': 'char', 'itos': ['a', 'b']}, id='NumPy'),
    pytest.param(OrderedDict(vocab_size=2, itos=OrderedDict({1: 'b', 0: 'a'})),
                 {'kind': 'char', 'itos': ['a', 'b']}, id='OrderedDict'),
    pytest.param({'vocab_size': 2, 'itos': np.array(['a', 'b'])},
                 {'kind': 'char', 'itos': ['a', 'b']}, id='array'),
    pytest.param({'vocab_size': 2, 'itos': defaultdict(str, {0: 'a', 1: 'b'}),
                  'counts': Counter('ab')}, {'kind': 'char', 'itos': ['a', 'b']}, id='defaultdict'),
    pytest.param({'vocab_size': 2, 'itos': {0: 0, 1: 1}}, None, id='itos of bytes'),
    pytest.param({'vocab_size': 2, 'itos': [b'a', b'b']}, None, id='itos of byte strings'),
    pytest.param({'vocab_size': 3, 'itos': {0: 'a', 2: 'b'}}, None, id='itos with a gap'),
    pytest.param({'vocab_size': 3, 'itos': {}}, None, id='empty itos'),
    pytest.param({'vocab_size': 3, 'itos': None}, None, id='itos is None'),
    pytest.param({'vocab_size': 50257, 'tokenizer': 'gpt2'}, GPT2, id='name of GPT-2'),
    pytest.param({'vocab_size': 32000, 'tokenizer': 'sentencepiece'}, None, id='another name'),
    pytest.param({'vocab_size': 9, 'tokenizer': {'type': 'bpe'}}, None, id='unknown tokenizer'),
])
def test_load_meta(tmp_path, meta, spec):
    save_meta(tmp_path, meta)
    loaded = load_meta(tmp_path)
    assert loaded['vocab_size'] == meta['vocab_size']
    assert type(loaded['vocab_size']) is int
    assert tokenizer_spec(loaded) == spec


def test_byte_strings_of_an_old_protocol(tmp_path):
    save_meta(tmp_path, {'vocab_size': 2, 'stoi': {b'a': 0, b'b': 1}}, protocol=2)
    assert load_meta(tmp_path)['stoi'] == {b'a': 0, b'b': 1}


def test_gpt2_has_no_meta(tmp_path):
    assert meta_of(GPT2, 50257) is None
    assert load_meta(tmp_path) is None
    assert tokenizer_spec(None) == GPT2


class Bomb:
    """ Whatever runs the code in its pickle creates the file boom. """

    def __reduce__(self):
        return open, ('boom', 'w')


@pytest.mark.parametrize('meta, message', [
    pytest.param({'vocab_size': 3, 'itos': Bomb()}, 'contains code', id='function'),
    pytest.param({'vocab_size': 3.0}, 'vocab_size=3.0', id='float'),
    pytest.param({'vocab_size': np.array}, 'contains code', id='function of NumPy'),
    pytest.param({'vocab_size': 2**16 + 1}, 'uint16', id='too large'),
    pytest.param({'vocab_size': 0}, 'vocab_size=0', id='empty'),
    pytest.param({'itos': ['a']}, 'KeyError', id='no vocab_size'),
    pytest.param({'vocab_size': 1, 'tokenizer': {'kind': 'hf', 'json': '{', 'end': 0}},
                 'not a vocabulary', id='damaged tokenizer.json'),
    pytest.param(['a'], 'not a vocabulary', id='list'),
])
def test_meta_is_refused(tmp_path, monkeypatch, meta, message):
    monkeypatch.chdir(tmp_path)
    save_meta(tmp_path, meta)
    with pytest.raises(UserError, match=f'meta.pkl.*{message}'):
        load_meta(tmp_path)
    assert not (tmp_path / 'boom').exists()


def test_meta_is_truncated(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'itos': ['a']})[:10])
    with pytest.raises(UserError, match='not a vocabulary'):
        load_meta(tmp_path)
