"""
A dataset on disk, and the small things that everything on disk needs.

    data/<dataset>/train.bin, val.bin    little-endian uint16 token ids, one stream without borders
    data/<dataset>/meta.pkl              where the tokens are not GPT-2's: {'vocab_size', 'stoi', 'itos'} of
                                         characters, {'vocab_size', 'tokenizer'} of a Hugging Face tokenizer

Not here: how texts become bins (data/texts.py), which windows are read when (train.py).
"""
import os
import pickle
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent / 'data'

# -----------------------------------------------------------------------------
# errors and whole files

@contextmanager
def one_line_errors():
    """
    A ValueError, OSError or ImportError in the block ends the script with its message, one line, and
    exit code 1. Of a machine's processes the first speaks: torchrun ends the others while they wait.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            time.sleep(15)
        sys.exit(f'{Path(sys.argv[0]).name}: {" ".join(str(error).split())}')


def check_disk(folder, size):
    """ Raises OSError where `size` bytes do not fit on the disk of `folder`. """
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f'{folder}: {size / 1e6:,.1f} MB are to be written, and {free / 1e6:,.1f} MB are free')


@contextmanager
def whole_file(path):
    """
    Yields a temporary name beside `path`. When the block ends well, that file is flushed to the disk
    and renamed to `path`; when it fails, it is removed and the old `path` stays.
    """
    temporary = Path(f'{path}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == 'posix':  # the new name itself reaches the disk with its folder
        folder = os.open(temporary.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

# -----------------------------------------------------------------------------
# bins

def open_bin(dataset, split, block_size, vocab_size):
    """
    The token ids of a split: uint16 (N,), mapped from the disk, read-only. Raises FileNotFoundError or
    ValueError, with the command to run, where the bin is missing, too short for a window, or, by a sample,
    not of this vocabulary.
    """
    path = DATA / dataset / f'{split}.bin'
    scripts = sorted(script.parent.name for script in DATA.glob('*/prepare.py'))
    prepare = (f'run: python data/{dataset}/prepare.py' if dataset in scripts else
               f'datasets with a prepare.py are {", ".join(scripts)}')
    if not path.exists():
        there = ', '.join(sorted(other.name for other in path.parent.glob('*.bin')))
        raise FileNotFoundError(f'{path} is not there{there and f", but {there}"}; {prepare}')
    if (size := path.stat().st_size) % 2 or size < 4:
        raise ValueError(f'{path}: {size:,} bytes are no uint16 tokens; {prepare}')
    if size < 2 * (block_size + 1):
        raise ValueError(f'{path}: {size // 2:,} tokens; the most is --block_size={size // 2 - 1}')
    ids = np.asarray(np.memmap(path, dtype='<u2', mode='r'))
    if ids[:2048:2].any() and not ids[1:2048:2].any():
        raise ValueError(f'{path} holds tokens of 32 or 64 bits, not uint16; {prepare}')
    if (largest := largest_id(ids)) >= vocab_size:
        raise ValueError(f'{path} holds token {largest}, and its vocabulary has {vocab_size}; {prepare}')
    return ids


def largest_id(ids):
    """ The largest token id in a sample of 64 places of `ids` (N,); a whole scan would take minutes. """
    return max(int(ids[i:i + 1024].max()) for i in np.linspace(0, len(ids) - 1, 64, dtype=np.int64))


def windows(ids, starts, block_size):
    """ Windows and one token more, from `starts` (B,), in one gather -> int64 (B, block_size + 1). """
    return ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)

# -----------------------------------------------------------------------------
# tokenizers
#
# A tokenizer is kept, in meta.pkl and in checkpoints, as a record of plain data: {'kind': 'gpt2'};
# {'kind': 'char', 'itos': [characters]}; {'kind': 'hf', 'json': what tokenizer.json holds, 'end': the id
# of end-of-text, or None}.

class _DataOnly(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f'it carries code ({module}.{name}), which was not run; plain data is expected')


def load_meta(dataset):
    """ meta.pkl of a dataset, None where there is none. Raises ValueError where it is not plain data. """
    if not (path := DATA / dataset / 'meta.pkl').exists():
        return None
    try:
        with open(path, 'rb') as f:
            meta = _DataOnly(f).load()
        assert type(meta['vocab_size']) is int and 0 < meta['vocab_size'] <= 2**16, 'uint16 holds 65,536 ids'
        assert (hf := meta.get('tokenizer')) is None or hf['kind'] == 'hf' and get_tokenizer(hf)
        if 'itos' in meta:  # a dict, or a list
            meta['itos'] = [meta['itos'][i] for i in range(len(meta['itos']))]
            assert all(type(text) is str for text in meta['itos']), 'itos holds what is no text'
    except Exception as error:  # a broken pickle fails in any way
        raise ValueError(f'{path} is not a vocabulary: {error!r:.200}') from None
    return meta


def meta_of(record, vocab_size):
    """ What meta.pkl holds of a tokenizer; None of GPT-2's. """
    if record['kind'] != 'char':
        return {'vocab_size': vocab_size, 'tokenizer': record} if record['kind'] == 'hf' else None
    itos = dict(enumerate(record['itos']))
    return {'vocab_size': vocab_size, 'stoi': {c: i for i, c in itos.items()}, 'itos': itos}


def tokenizer_record(meta):
    """ The other way round; None where meta.pkl knows a size and nothing else. """
    if meta is None:
        return {'kind': 'gpt2'}
    return {'kind': 'char', 'itos': meta['itos']} if 'itos' in meta else meta.get('tokenizer')


def hf_record(name):
    """ The record of the tokenizer in a Hugging Face directory, or on the hub. """
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return {'kind': 'hf', 'json': tokenizer.backend_tokenizer.to_str(), 'end': tokenizer.eos_token_id}
    except Exception as error:  # broken files fail in any way
        raise ValueError(f'{name}: no tokenizer there that tokenizer.json can hold ({error})') from None


def get_tokenizer(record):
    """
    -> encode(text, special=False), decode(ids), vocabulary size, id of end-of-text or None. With `special`,
    the names of special tokens in a text ('<|endoftext|>') are those tokens, and not letters. Raises OSError
    where GPT-2's can't be fetched; encode, ValueError at an unknown character.
    """
    if record['kind'] == 'char':
        itos = record['itos']
        stoi = {c: i for i, c in enumerate(itos)}

        def encode(text, special=False):
            if unknown := sorted(set(text) - set(stoi)):
                raise ValueError(f'{"".join(unknown)!r:.99} is not in the vocabulary, {"".join(itos)!r:.199}')
            return [stoi[c] for c in text]
        return encode, lambda ids: ''.join(itos[i] for i in ids), len(itos), None

    if record['kind'] == 'hf':
        from tokenizers import Tokenizer
        hf = Tokenizer.from_str(record['json'])
        hf.no_truncation()
        hf.no_padding()

        def encode(text, special=False):
            hf.encode_special_tokens = not special
            try:
                return hf.encode(text, add_special_tokens=False).ids
            except Exception as error:  # it has no token for a character, and none for the unknown
                raise ValueError(f'no tokens for {text!r:.50}: {error}') from None
        decode = lambda ids: hf.decode(ids, skip_special_tokens=False)
        return encode, decode, max(hf.get_vocab().values()) + 1, record['end']

    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except OSError as error:  # every error of requests is one
        cache = os.environ.get('TIKTOKEN_CACHE_DIR') or Path(tempfile.gettempdir(), 'data-gym-cache')
        raise OSError("could not fetch GPT-2's tokenizer, vocab.bpe and encoder.json: "
                      f'{type(error).__name__}. tiktoken would cache it in {cache}: copy that from '
                      'a machine with a network, set TIKTOKEN_CACHE_DIR to it, or take python_char') from None

    def encode(text, special=False):
        return bpe.encode_to_numpy(text, allowed_special='all' if special else set(), disallowed_special=())
    return encode, bpe.decode, bpe.n_vocab, bpe.eot_token
