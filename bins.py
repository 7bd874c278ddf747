"""
A dataset on disk, and the small things that everything on disk needs.

    data/<dataset>/train.bin, val.bin    little-endian uint16 token ids, one stream without borders
    data/<dataset>/meta.pkl              character datasets alone: {'vocab_size', 'stoi', 'itos'}

Not here: which text and how it is split (data/*/prepare.py), which windows are read when (train.py).
"""
import http.client
import os
import pickle
import shutil
import sys
import time
import urllib.request
from contextlib import contextmanager
from hashlib import sha256
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


def download(url, path, digest=None):
    """ Fetches `url` into `path`, if nothing is there. Raises OSError on failure or another SHA-256. """
    if path.exists():
        return
    from tqdm import tqdm
    try:
        with whole_file(path) as temporary:
            with urllib.request.urlopen(url, timeout=30) as reply, open(temporary, 'wb') as f:
                with tqdm.wrapattr(f, 'write', getattr(reply, 'length', None), desc=path.name) as out:
                    shutil.copyfileobj(reply, out)
            broken_off = getattr(reply, 'length', 0)  # what the server announced and did not send
            if broken_off or digest and sha256(temporary.read_bytes()).hexdigest() != digest:
                raise OSError('what came is not the whole text that was expected')
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f'could not download {url} ({error}). Save that text as {path} and run this '
                      'again, or run data/python_char/prepare.py, which needs no network') from None

# -----------------------------------------------------------------------------
# bins

def write_bin(path, ids):
    """ Writes token ids, any integer array, as uint16. Raises ValueError where one does not fit. """
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
        raise ValueError(f'{path}: ids from {ids.min()} to {ids.max()} do not fit into uint16')
    ids.astype('<u2').tofile(path)


def write_chars(folder, text, chars=None):
    """
    Writes train.bin (the first 90% of the characters), val.bin (the rest) and meta.pkl, and prints
    the counts. Ids number the sorted `chars`, by default those of the text itself.
    """
    if len(text) < 10:
        raise ValueError(f'{folder}: a text of {len(text)} characters is too short to split')
    chars = sorted(set(text) if chars is None else chars)
    known = np.array([ord(c) for c in chars], dtype=np.uint32)
    codes = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
    ids = np.searchsorted(known, codes)
    if (strange := known[np.minimum(ids, len(known) - 1)] != codes).any():
        raise ValueError(f'the vocabulary lacks the character {text[strange.argmax()]!r}')
    cut = int(len(ids) * 0.9)
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}
    with (whole_file(folder / 'meta.pkl') as pkl, whole_file(folder / 'val.bin') as val,
          whole_file(folder / 'train.bin') as train):  # all are written before the first is renamed
        write_bin(train, ids[:cut])
        write_bin(val, ids[cut:])
        pkl.write_bytes(pickle.dumps(meta))
    print(f'characters: {len(text):,}, {len(chars)} of them distinct')
    print(f'train.bin: {cut:,} tokens')
    print(f'val.bin: {len(ids) - cut:,} tokens')


def open_bin(dataset, split, block_size):
    """
    The token ids of a split: uint16 (N,), mapped from the disk, read-only. Raises FileNotFoundError or
    ValueError, with the command to run, where the bin is missing or too short for a window.
    """
    path = DATA / dataset / f'{split}.bin'
    scripts = sorted(script.parent.name for script in DATA.glob('*/prepare.py'))
    prepare = (f'run: python data/{dataset}/prepare.py' if dataset in scripts else
               f'datasets with a prepare.py are {", ".join(scripts)}')
    if not path.exists():
        raise FileNotFoundError(f'{path} is not there; {prepare}')
    if (size := path.stat().st_size) % 2 or size < 4:
        raise ValueError(f'{path}: {size:,} bytes are no uint16 tokens; {prepare}')
    if size < 2 * (block_size + 1):
        raise ValueError(f'{path}: {size // 2:,} tokens; the most is --block_size={size // 2 - 1}')
    return np.asarray(np.memmap(path, dtype='<u2', mode='r'))


def largest_id(ids):
    """ The largest token id in a sample of 64 places of `ids` (N,); a whole scan would take minutes. """
    return max(int(ids[i:i + 1024].max()) for i in np.linspace(0, len(ids) - 1, 64, dtype=np.int64))


def windows(ids, starts, block_size):
    """ Windows and one token more, from `starts` (B,), in one gather -> int64 (B, block_size + 1). """
    return ids[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)

# -----------------------------------------------------------------------------
# tokenizers

class _DataOnly(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f'it carries code ({module}.{name}), which was not run')


def load_meta(dataset):
    """ meta.pkl of a dataset, None where there is none. Raises ValueError where it is not plain data. """
    if not (path := DATA / dataset / 'meta.pkl').exists():
        return None
    try:
        with open(path, 'rb') as f:
            meta = _DataOnly(f).load()
        meta['vocab_size'].bit_length()  # fails where it is no whole number
        if 'itos' in meta:  # a dict, or a list
            meta['itos'] = [meta['itos'][i] for i in range(len(meta['itos']))]
    except Exception as error:  # a broken pickle fails in any way
        raise ValueError(f'{path} is not a vocabulary: {error!r:.200}') from None
    return meta


def tokenizer_record(meta):
    """ What a checkpoint keeps of a dataset's tokenizer, plain data; None where meta has no characters. """
    if meta is None:
        return {'kind': 'gpt2'}
    return {'kind': 'char', 'itos': meta['itos']} if 'itos' in meta else None


def get_tokenizer(record):
    """
    `record`, as above or {'kind': 'hf', 'name': a Hugging Face directory} -> encode(text), decode(ids), size
    of the vocabulary. Raises OSError where it can't be fetched; encode, ValueError at an unknown character.
    """
    if record['kind'] == 'char':
        itos = record['itos']
        stoi = {c: i for i, c in enumerate(itos)}

        def encode(text):
            if unknown := sorted(set(text) - set(stoi)):
                raise ValueError(f'{"".join(unknown)!r} is not in the vocabulary, {"".join(itos)!r}')
            return [stoi[c] for c in text]
        return encode, lambda ids: ''.join(itos[i] for i in ids), len(itos)

    if record['kind'] == 'hf':
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(record['name'])
        return tokenizer.encode, tokenizer.decode, len(tokenizer)

    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except OSError as error:  # every error of requests is one
        raise OSError(f"could not fetch GPT-2's tokenizer ({type(error).__name__}), which tiktoken keeps "
                      'under TIKTOKEN_CACHE_DIR; character datasets need none') from None
    return lambda text: bpe.encode(text, allowed_special={'<|endoftext|>'}), bpe.decode, bpe.n_vocab
