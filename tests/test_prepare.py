""" The prepare scripts, from input files to bins, and what a user does next with these. """
import json
import os
import pickle
import re
import shlex
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
from conftest import ROOT, flags, run, save_checkpoint, train
from fake_gpt2 import prose

from components import text_sources
from components import tokenizer as tokenizer_module
from model import GPT, GPTConfig


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
        assert not list(clone.glob('data/*/*.tmp'))
        return capsys.readouterr().out

    return execute

# -----------------------------------------------------------------------------
# Shakespeare, Holmes, Python

SPEECH = 'First Citizen:\n\nSpeak, speak the speech.\n' * 50


def test_prepare_shakespeare(clone, prepare, gpt2):
    """ Of characters and of GPT-2's tokens; the last 10% of the characters are for validation. """
    characters = clone / 'data/shakespeare_char'
    tokens = clone / 'data/shakespeare'
    for folder in (characters, tokens):
        (folder / 'input.txt').write_text(SPEECH)
        prepare(folder.name)
    num_train = int(len(SPEECH) * 0.9)
    assert read_text(characters, 'train') == SPEECH[:num_train]
    assert read_text(characters, 'val') == SPEECH[num_train:]
    assert read(tokens, 'train') == gpt2.encode_ordinary(SPEECH[:num_train])
    assert read(tokens, 'val') == gpt2.encode_ordinary(SPEECH[num_train:])
    assert not (tokens / 'meta.pkl').exists()


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
def test_prepare_python_char(clone, prepare):
    import __future__  # the first by path
    prepare('python_char')
    folder = clone / 'data/python_char'
    text = read_text(folder, 'train')
    with open(__future__.__file__) as file:
        assert text[:3000] == file.read()[:3000]
    assert 5e6 < len(text) < 12e6
    itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
    assert ''.join(itos.values()) == '\n' + ''.join(map(chr, range(ord(' '), ord('~') + 1)))

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
    sizes = np.random.default_rng(0).integers(10, 20_000, size=500).tolist()
    documents = [prose(size, seed=size) for size in sizes]
    write_jsonl(tmp_path / '0.jsonl', documents[:350])
    write_parquet(tmp_path / '1.parquet', documents[350:])
    folder = clone / 'data/openwebtext'
    out, _ = run(folder / 'prepare.py', cwd=tmp_path, source='.')
    assert 'documents: 500' in out
    assert 'WARNING' in out
    parts = datasets.Dataset.from_dict({'text': documents}).train_test_split(0.0005, seed=2357)
    assert read(folder, 'train') == encode_all(gpt2, parts['train']['text'], after=[50256])
    assert read(folder, 'val') == encode_all(gpt2, parts['test']['text'], after=[50256])
    assert not list(folder.glob('*.tmp'))


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
    with pytest.raises(SystemExit, match='a.jsonl, row 2: 1 is not a text') as stopped:
        prepare('bookcorpus', source='a.jsonl')
    assert '\n' not in stopped.value.code
    names = sorted(path.name for path in (clone / 'data/bookcorpus').iterdir())
    assert names == ['prepare.py', 'readme.md']

# -----------------------------------------------------------------------------
# custom


@pytest.mark.parametrize('piece_size', [100, 10**6])
def test_custom_one_document(tmp_path, prepare, monkeypatch, gpt2, piece_size):
    """ It is split by its characters, and the end-of-text token is the last of val.bin. """
    monkeypatch.setattr(text_sources, 'PIECE_SIZE', piece_size)
    text = prose(5000)
    (tmp_path / 'mine').write_text(text)
    prepare('custom', source='mine', name=tmp_path / 'bins', val_fraction=0.2)
    num_train = int(0.8 * len(text))
    assert gpt2.decode(read(tmp_path / 'bins', 'train')) == text[:num_train]
    assert gpt2.decode(read(tmp_path / 'bins', 'val')) == text[num_train:] + '<|endoftext|>'


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
    held_out = set(np.random.default_rng(2357).permutation(10)[:3].tolist())
    folder = clone / 'data/mine'
    val = [document for number, document in enumerate(documents) if number in held_out]
    assert read_text(folder, 'val') == ''.join(val)
    train = [document for number, document in enumerate(documents) if number not in held_out]
    assert read_text(folder, 'train') == ''.join(train)


@pytest.mark.parametrize('sizes, val_fraction', [
    ([3000, 580_000], 0.1),
    ([580_000, 3000], 0.1),
    ([100, 100], 0.5),
    ([100] * 4, 0.9),
    ([1, 0, 5, 40, 2000, 30, 1000] * 9, 0.2),
    ([5, 6, 7] * 100, 0.1),
])
def test_custom_share_of_characters(tmp_path, prepare, sizes, val_fraction):
    """ Whole documents where that is near val_fraction; else one is cut. Nothing is lost. """
    documents = [chr(0x4e00 + number) * size for number, size in enumerate(sizes)]
    write_jsonl(tmp_path / 'a.jsonl', [document + '\n' for document in documents])
    out = prepare('custom', source='a.jsonl', name=tmp_path / 'bins', tokenizer='char',
                  val_fraction=val_fraction)
    train_text = read_text(tmp_path / 'bins', 'train')
    val_text = read_text(tmp_path / 'bins', 'val')
    share = len(val_text) / len(train_text + val_text)
    tolerance = 0.1 * min(val_fraction, 1 - val_fraction)
    assert abs(share - val_fraction) <= min(tolerance, max(sizes) / sum(sizes)) + 0.002
    assert f'({share:.2%})' in out
    assert 'NOTE' not in out
    num_cut = 0
    for document in documents:
        num_in_val = val_text.count(document[:1])
        assert document == '' or train_text.count(document[0]) + num_in_val == len(document)
        num_cut += 0 < num_in_val < len(document)
    assert num_cut <= 1
    assert not re.search(r'(\w)(?!\1)\w', train_text)  # two documents on a line


@pytest.mark.parametrize('tokenizer, end', [('gpt2', [50256]), ('char', [])])
def test_custom_files_by_split(tmp_path, prepare, gpt2, tokenizer, end):
    source = tmp_path / 'source'
    source.mkdir()
    texts = {'train': 'the cat ' * 9, 'valid': 'the the', 'test': 'cat'}
    for split, text in texts.items():
        (source / f'{split}.txt').write_text(text)
    out = prepare('custom', source='source', name=tmp_path / 'bins', tokenizer=tokenizer)
    assert 'NOTE: val.bin has ' not in out
    for split, name in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        ids = read(tmp_path / 'bins', split)
        if tokenizer == 'gpt2':
            assert ids == encode_all(gpt2, [texts[name]], after=end)
        else:
            assert read_text(tmp_path / 'bins', split) == texts[name]  # without a newline

    (source / 'valid.txt').unlink()
    (source / 'test.txt').write_text('cat ' * 20)
    prepare('custom', source='source', name=tmp_path / 'bins', tokenizer='char')
    assert read_text(tmp_path / 'bins', 'test') == 'cat ' * 20
    assert read_text(tmp_path / 'bins', 'train') + read_text(tmp_path / 'bins', 'val') == (
        texts['train'])
    (source / 'dev.txt').write_text('cat ' * 20)
    out = prepare('custom', source='source', name=tmp_path / 'bins', tokenizer='char')
    assert 'NOTE' not in out


@pytest.mark.usefixtures('gpt2')
def test_custom_notes_another_share(tmp_path, prepare):
    (tmp_path / 'a.txt').write_text('the cat ' * 900 + '\u4e00' * 800)
    out = prepare('custom', source='a.txt', name=tmp_path / 'bins')
    assert 'NOTE: val.bin has ' in out


@pytest.mark.parametrize('texts, expected', [
    pytest.param(['emma', 'olivia', 'ava'], 'emma\nolivia\nava\n', id='names'),
    pytest.param(['one\n', '', 'two\n'], 'one\ntwo\n', id='newlines of their own'),
    pytest.param(['acgt'], 'acgt', id='one document'),
])
@pytest.mark.parametrize('tokenizer', ['char', 'no end'])
def test_custom_newline_between_documents(tmp_path, prepare, texts, expected, tokenizer):
    itos = sorted(set(expected))
    model = tokenizers.models.BPE({character: i for i, character in enumerate(itos)}, [])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    saved.save_pretrained(tmp_path / 'no end')
    (tmp_path / 'source').mkdir()
    for split in ('train', 'val'):
        write_jsonl(tmp_path / f'source/{split}.jsonl', texts)
    out = prepare('custom', source='source', name=tmp_path / 'bins', tokenizer=tokenizer)
    assert out.count('each document ends with a newline') == int(len(texts) > 1)
    ids = read(tmp_path / 'bins', 'train')
    assert ''.join(itos[i] for i in ids) == expected


def test_custom_no_mark_between_documents(tmp_path, prepare):
    """ Nothing is claimed of a tokenizer with neither a newline nor an end-of-text token. """
    model = tokenizers.models.BPE({'a': 0, 'b': 1}, [])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    saved.save_pretrained(tmp_path / 'hf')
    (tmp_path / 'source').mkdir()
    for split in ('train', 'val'):
        write_jsonl(tmp_path / f'source/{split}.jsonl', ['ab', 'ba'])
    out = prepare('custom', source='source', name=tmp_path / 'bins', tokenizer='hf')
    assert 'nothing marks where a document ends' in out
    assert 'ends with a newline' not in out
    assert read(tmp_path / 'bins', 'train') == [0, 1, 1, 0]


def test_custom_end_of_text_in_a_text(tmp_path, prepare, gpt2):
    stories = 'the cat<|endoftext|>\nthe mat<|endoftext|>' * 20
    (tmp_path / 'a.txt').write_text(stories)
    prepare('custom', source='a.txt', name=tmp_path / 'bins')
    ids = read(tmp_path / 'bins', 'train') + read(tmp_path / 'bins', 'val')
    assert ids.count(50256) == 40
    assert gpt2.decode(ids) == stories


@pytest.mark.parametrize('position', range(1, 14))
def test_custom_cut_in_a_special_token(tmp_path, prepare, gpt2, position):
    """ It moves behind the token's name; a cut beside the name stays. """
    before = 'a' * (500 - position)
    (tmp_path / 'a.txt').write_text(before + '<|endoftext|>' + 'b' * (487 + position))
    prepare('custom', source='a.txt', name=tmp_path / 'bins', val_fraction=0.5)
    train = read(tmp_path / 'bins', 'train')
    val = read(tmp_path / 'bins', 'val')
    assert train[-1] == 50256
    assert gpt2.decode(train + val) == (tmp_path / 'a.txt').read_text() + '<|endoftext|>'


def test_custom_suffixes_and_key(tmp_path, prepare):
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'a.md').write_text('# Title\n')
    (source / 'b.PY').write_text('x = 1\n' * 9)
    (source / 'readme.txt').write_text('short')
    for suffixes in ('.md,.py', 'md, *.py'):
        out = prepare('custom', f'--suffixes={suffixes}', source='source', name=tmp_path / 'bins',
                      tokenizer='char')
        assert 'skipped files: 1 .txt' in out
        assert '2 files, 2 documents, 62 characters' in out
    (source / 'c').write_text('y')
    out = prepare('custom', '--suffixes=.md,', source='source', name=tmp_path / 'bins',
                  tokenizer='char')
    assert '2 files, 2 documents, 9 characters' in out
    (tmp_path / 'a.csv').write_text('id,content\n1,cat\n2,mat\n')
    out = prepare('custom', source='a.csv', key='content', name=tmp_path / 'bins', tokenizer='char')
    assert '1 files, 2 documents, 6 characters' in out


@pytest.mark.parametrize('tokenizer', ['run/ckpt.pt', 'run', 'first', 'gpt2-bins'])
def test_custom_vocabulary_of_a_model(clone, tmp_path, prepare, gpt2, tokenizer):
    """ That of a checkpoint, of a run, of a dataset, of a dataset in GPT-2's tokens. """
    (tmp_path / 'first.txt').write_text('the cat sat\n' * 9)
    prepare('custom', source='first.txt', name='first', tokenizer='char')
    prepare('custom', source='first.txt', name='gpt2-bins')
    meta = pickle.loads((clone / 'data/first/meta.pkl').read_bytes())
    itos = [meta['itos'][i] for i in range(meta['vocab_size'])]
    model = GPT(GPTConfig(block_size=8, vocab_size=len(itos), n_layer=1, n_head=2, n_embd=16))
    (tmp_path / 'run').mkdir()
    save_checkpoint(tmp_path / 'run/ckpt.pt', model, tokenizer={'kind': 'char', 'itos': itos})

    (tmp_path / 'second.txt').write_text('a cat\n' * 9)
    prepare('custom', source='second.txt', name='second', tokenizer=tokenizer)
    folder = clone / 'data/second'
    ids = read(folder, 'train') + read(folder, 'val')
    if tokenizer == 'gpt2-bins':
        assert gpt2.decode(ids) == 'a cat\n' * 9 + '<|endoftext|>'
        return
    assert ''.join(itos[i] for i in ids) == 'a cat\n' * 9
    assert (folder / 'meta.pkl').read_bytes() == (clone / 'data/first/meta.pkl').read_bytes()

    (tmp_path / 'second.txt').write_text('a cat \U0001f600\n' * 9)
    with pytest.raises(SystemExit, match="no token for '\U0001f600'.*--tokenizer=char"):
        prepare('custom', source='second.txt', name='second', tokenizer=tokenizer)
    assert read(folder, 'train') + read(folder, 'val') == ids
    out = prepare('custom', source='second.txt', name='second', tokenizer='char')
    assert '--tokenizer=PATH/ckpt.pt' in out


@pytest.mark.parametrize('settings, message', [
    pytest.param(dict(source='nowhere'), 'nowhere does not exist', id='missing source'),
    pytest.param(dict(source=''), 'set --source=', id='no source'),
    pytest.param(dict(tokenizer='gpt-2'), "tokenizer='gpt-2'", id='tokenizer'),
    pytest.param(dict(tokenizer='.'), 'no tokenizer', id='no tokenizer'),
    pytest.param(dict(val_fraction=1), 'val_fraction=1.0', id='val_fraction'),
    pytest.param(dict(name='shakespeare'), 'choose another --name', id='name taken'),
    pytest.param(dict(name=''), "name=''", id='empty name'),
    pytest.param(dict(name='../x'), "name='../x'", id='name outside of data'),
    pytest.param(dict(source='clone/config'), r'no \*.txt or \*.jsonl.* \.py, .*--suffixes=.*\.py',
                 id='no file'),
    pytest.param(dict(source='a.json', key='b'), "no key 'b', only 'content'.*--key=", id='key'),
    pytest.param(dict(tokenizer='good.txt'), 'good.txt is not a .*checkpoint', id='no checkpoint'),
    pytest.param(dict(tokenizer=''), "tokenizer=''", id='empty tokenizer'),
    pytest.param(dict(tokenizer='holmes'), "tokenizer='holmes'", id='dataset without bins'),
    pytest.param(dict(source='latin.txt'), 'line 1: not in UTF-8', id='not in UTF-8'),
    pytest.param(dict(source='empty.txt'), 'no text', id='no text'),
])
@pytest.mark.usefixtures('gpt2')
def test_custom_refuses(clone, tmp_path, prepare, settings, message):
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
    (tmp_path / 'good.txt').write_text('text\n')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'a.json').write_text('[{"content": "a"}]')
    with pytest.raises(SystemExit, match=message) as stopped:
        prepare('custom', **{'source': 'good.txt', **settings})
    assert '\n' not in stopped.value.code
    assert not list(clone.glob('data/*/*.bin*'))


def test_custom_tokenizer_without_a_character(tmp_path, prepare):
    model = tokenizers.models.BPE({'a': 0, 'b': 1, '\n': 2}, [])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
    saved.save_pretrained(tmp_path / 'hf')
    (tmp_path / 'a.txt').write_text('ab\nab\u00e9\n')
    with pytest.raises(SystemExit, match="no token for '\u00e9'"):
        prepare('custom', source='a.txt', name=tmp_path / 'bins', tokenizer='hf')


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
    return bpe


@pytest.mark.slow
def test_custom_hugging_face_tokenizer_trained_and_sampled(tmp_path, prepare, bpe):
    """ The dataset and the checkpoint hold the tokenizer. """
    documents = [f'the cat {i:02} sat on a mat.\n' * 20 for i in range(20)]
    documents[3] = documents[3][:-12] + '<eos>the cat'  # the token
    write_jsonl(tmp_path / 'a.jsonl', documents)
    folder = tmp_path / 'bins'
    prepare('custom', source='a.jsonl', name=folder, tokenizer='hf', val_fraction=0.2)
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
@pytest.mark.parametrize('settings, num_commands', [
    pytest.param(dict(tokenizer='char'), 1, id='char'),
    pytest.param(dict(tokenizer='gpt2'), 2, id='gpt2'),
    pytest.param(dict(tokenizer='hf'), 1, id='tokenizer without weights'),
    pytest.param(dict(tokenizer='my hf'), 2, id='Hugging Face directory'),
    pytest.param(dict(tokenizer='my run'), 2, id='run'),
])
@pytest.mark.usefixtures('gpt2', 'bpe')
def test_custom_printed_commands(tmp_path, prepare, settings, num_commands):
    """ They train, here for one iteration: of a short text, and with spaces in names. """
    text = prose(400)
    (tmp_path / 'my text.txt').write_text(text)
    shutil.copytree(tmp_path / 'hf', tmp_path / 'my hf')
    for folder, vocab_size in (('my hf', 300), ('fake gpt2', 50257)):
        config = transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=32 if folder == 'my hf' else 1024, n_embd=16,
            n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / folder)
    itos = sorted({*text, '#'})
    model = GPT(GPTConfig(block_size=24, vocab_size=len(itos), n_layer=1, n_head=2, n_embd=16))
    (tmp_path / 'my run').mkdir()
    save_checkpoint(tmp_path / 'my run/ckpt.pt', model, tokenizer={'kind': 'char', 'itos': itos})

    out = prepare('custom', source='my text.txt', name=tmp_path / 'my bins', **settings)
    commands = [line.partition(': python train.py ')[2] for line in out.splitlines()
                if 'python train.py' in line]
    assert len(commands) == num_commands
    few = dict(max_iters=1, lr_decay_iters=1, cooldown_iters=1, warmup_iters=0, eval_iters=1,
               gradient_accumulation_steps=1, device='cpu')
    for command in commands:
        arguments = shlex.split(command.replace('--init_from=gpt2', "'--init_from=fake gpt2'"))
        run('train.py', ROOT / arguments[0], *arguments[1:], cwd=tmp_path, **few)
    assert (tmp_path / 'out-my bins/ckpt.pt').exists()

# -----------------------------------------------------------------------------
# interruptions


def kill_workers(process):
    """
    As the system does where memory runs out. They begin to work: Python would wait forever for the
    rest of a result that a worker was sending.
    """
    command = ['pgrep', '-P', str(process.pid), '-f', 'spawn_main']
    workers = []
    while not workers:
        assert process.poll() is None
        workers = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout.split()
    time.sleep(0.2)
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)


def has_content(path):
    return path.exists() and path.stat().st_size > 0


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='needs the signals of POSIX')
@pytest.mark.usefixtures('gpt2')
@pytest.mark.parametrize('interrupt, code, message', [
    pytest.param(subprocess.Popen.kill, -signal.SIGKILL, None, id='kill -9'),
    pytest.param(kill_workers, 1, 'memory ran out', id='killed workers'),
    pytest.param(press_ctrl_c, 1, 'prepare.py: interrupted', id='Ctrl-C'),
])
def test_interrupted_preparation(tmp_path, interrupt, code, message):
    """ One line, without a worker's traceback. The old bins stay, and no process. """
    (tmp_path / 'a.txt').write_text(prose(8_000_000))
    folder = tmp_path / 'bins'
    folder.mkdir()
    (folder / 'train.bin').write_text('old')
    script = ROOT / 'data/custom/prepare.py'
    process = subprocess.Popen(
        [sys.executable, script, '--source=a.txt', f'--name={folder}'], cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # shells may ignore it
    temporary = folder / 'train.bin.tmp'
    while interrupt is not kill_workers and not has_content(temporary):  # the first batch
        assert process.poll() is None
        time.sleep(0.01)
    interrupt(process)
    _, error = process.communicate(timeout=60)  # ends when no worker holds standard error
    assert process.returncode == code
    assert (folder / 'train.bin').read_text() == 'old'
    if message is not None:
        assert message in error.splitlines()[-1]
        assert 'Traceback' not in error
        assert [path.name for path in folder.iterdir()] == ['train.bin']


@pytest.mark.skipif(os.name == 'nt', reason='needs fcntl')
def test_one_preparation_at_a_time(tmp_path, prepare):
    import fcntl
    (tmp_path / 'a.txt').write_text('some text')
    (tmp_path / 'bins').mkdir()
    descriptor = os.open(tmp_path / 'bins', os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    settings = dict(source='a.txt', name=tmp_path / 'bins', tokenizer='char')
    with pytest.raises(SystemExit, match='another process is preparing'):
        prepare('custom', **settings)
    os.close(descriptor)
    prepare('custom', **settings)
