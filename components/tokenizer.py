"""
The three tokenizers (characters, GPT-2's BPE, any Hugging Face tokenizer), and how they are stored.

Checkpoints and meta.pkl store a tokenizer as a spec of plain data, one of

    {'kind': 'gpt2'}
    {'kind': 'char', 'itos': [character, ...]}
    {'kind': 'hf', 'json': content of tokenizer.json, 'end': id of the end-of-text token or None}

A dataset has a data/<dataset>/meta.pkl unless its tokens are GPT-2's:

    {'vocab_size', 'stoi', 'itos'}       of characters, the format of nanoGPT
    {'vocab_size', 'tokenizer': spec}    of a Hugging Face tokenizer

Not here: how a text is encoded on all cores (text_to_bins.py), and reading token ids (dataset.py).
"""
import pickle
from pathlib import Path

import numpy as np

from components.errors import UserError

DATA_DIR = Path(__file__).resolve().parents[1] / 'data'
MAX_VOCAB_SIZE = 2**16  # bins store token ids as uint16
END_TOKENS = ('<|endoftext|>', '</s>', '<eos>', '[EOS]', '[SEP]')  # of tokenizers that name none
GPT2_VOCAB_SIZES = range(50257, 50304 + 1)  # GPT-2's, and padded to a multiple of 64
GPT2_TOKENS = {'\u0120the': 262, '<|endoftext|>': 50256}  # enough to tell them from others

# -----------------------------------------------------------------------------
# tokenizers


class CharTokenizer:
    """ One token for each character. """

    def __init__(self, itos):
        self.itos = itos
        self.stoi = {character: i for i, character in enumerate(itos)}
        self.vocab_size = len(itos)
        self.end_of_text = None

    def encode(self, text, special=False):
        """ Raises UserError if `text` has a character that is not in the vocabulary. """
        unknown = ''.join(sorted(set(text).difference(self.stoi)))
        if unknown:
            vocabulary = ''.join(self.itos)
            raise UserError(f'{unknown!r:.99} is not in the vocabulary, {vocabulary!r:.199}')
        return [self.stoi[character] for character in text]

    def decode(self, ids):
        return ''.join(self.itos[i] for i in ids)


class GPT2Tokenizer:
    """ GPT-2's byte-level BPE by tiktoken. Raises OSError if its files cannot be downloaded. """

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except OSError as error:  # every exception of requests is an OSError
            raise OSError(
                f"could not download GPT-2's tokenizer ({type(error).__name__}); set "
                "TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache from another machine, or use the "
                'dataset python_char, which needs no network') from None
        self.vocab_size = self.bpe.n_vocab
        self.end_of_text = self.bpe.eot_token

    def encode(self, text, special=False):
        allowed = 'all' if special else set()
        return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode(ids)


class HuggingFaceTokenizer:
    """
    A tokenizer of the library tokenizers, from the content of a tokenizer.json.

    Args:
        content: str, the JSON
        end_of_text: id of the end-of-text token, or None
    """

    def __init__(self, content, end_of_text):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()  # many models store it with a maximum length
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # ids may have gaps
        self.end_of_text = end_of_text

    def encode(self, text, special=False):
        """ Raises UserError if a character has no token, and there is no unknown token. """
        self.tokenizer.encode_special_tokens = not special
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(f'no tokens for {text!r:.50}: {error}') from None

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def get_tokenizer(spec):
    """
    The tokenizer of a spec: an object with

        encode(text, special=False) -> list of ids. With `special`, the name of a special token
            in `text`, such as '<|endoftext|>', becomes that token; without, it is plain text.
        decode(ids) -> str
        vocab_size: int, above the largest id
        end_of_text: id of the token that ends a document, or None
    """
    if spec['kind'] == 'char':
        return CharTokenizer(spec['itos'])
    if spec['kind'] == 'hf':
        return HuggingFaceTokenizer(spec['json'], spec['end'])
    return GPT2Tokenizer()

# -----------------------------------------------------------------------------
# specs


def hf_spec(name):
    """
    The spec of the tokenizer of a Hugging Face directory, or of a model on the hub. Raises
    UserError if there is none that a tokenizer.json can hold.
    """
    try:
        tokenizer = load_hf_tokenizer(name)
        backend = tokenizer.backend_tokenizer
        if not backend.get_vocab(with_added_tokens=False):  # transformers found no file
            raise ValueError('no vocabulary that its tokenizer class reads')
    except Exception as error:  # damaged files raise any exception
        reason = str(error).partition('\n')[0]
        raise UserError(
            f'{name}: no tokenizer that tokenizer.json can hold ({reason:.200}); add that file (to '
            'read a spiece.model: pip install sentencepiece, and name its class in '
            'tokenizer_config.json)') from None
    vocabulary = backend.get_vocab()
    end = next((token for token in (tokenizer.eos_token, *END_TOKENS) if token in vocabulary), None)
    if end is not None:
        backend.add_special_tokens([end])  # it keeps its id
    return {'kind': 'hf', 'json': backend.to_str(), 'end': vocabulary.get(end)}


def load_hf_tokenizer(name):
    """ The tokenizer of transformers for a directory, or for a model on the hub. """
    import transformers
    transformers.logging.set_verbosity_error()
    folder = Path(name)
    if (folder / 'tokenizer.json').exists():  # a GPT2Tokenizer would read its vocabulary alone
        return transformers.PreTrainedTokenizerFast.from_pretrained(name)
    configs = [path.read_text(encoding='utf-8') for path in folder.glob('*config.json')]
    if not any('"tokenizer_class"' in config for config in configs):
        # a vocabulary as the library tokenizers saves it
        if (folder / 'merges.txt').exists():  # without None, <|endoftext|> would be added
            return transformers.GPT2Tokenizer.from_pretrained(
                name, bos_token=None, eos_token=None, unk_token=None)
        if (folder / 'vocab.txt').exists():
            return transformers.BertTokenizer.from_pretrained(name)
    return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def has_tokenizer(folder):
    """ Whether a Hugging Face directory has a tokenizer beside its model. """
    names = ('tokenizer.json', 'vocab.json', 'vocab.txt', '*.model')
    return any(any(Path(folder).glob(name)) for name in names)


def tokens_of(spec):
    """ {token: id} of a tokenizer, for has_tokens_of(). """
    if spec['kind'] == 'gpt2':
        return GPT2_TOKENS
    if spec['kind'] == 'char':
        return {character: i for i, character in enumerate(spec['itos'])}
    vocabulary = get_tokenizer(spec).tokenizer.get_vocab()
    return GPT2_TOKENS if GPT2_TOKENS.items() <= vocabulary.items() else vocabulary


def has_tokens_of(spec, other):
    """ Whether a tokenizer has all tokens of another one, with the same ids. Takes specs. """
    return spec == other or tokens_of(other).items() <= tokens_of(spec).items()

# -----------------------------------------------------------------------------
# meta.pkl


class _PlainDataUnpickler(pickle.Unpickler):
    """ Refuses classes and functions but PLAIN_DATA, so that loading a file cannot run code. """

    def find_class(self, module, name):
        module = module.replace('numpy.core', 'numpy._core')  # the name before NumPy 2
        if (module, name) not in PLAIN_DATA:
            raise pickle.UnpicklingError(f'it contains code ({module}.{name}), which was not run')
        return super().find_class(module, name)


PLAIN_DATA = {
    ('builtins', 'int'), ('builtins', 'str'), ('builtins', 'list'), ('builtins', 'dict'),
    ('builtins', 'set'), ('builtins', 'bytearray'), ('_codecs', 'encode'),  # of bytes
    ('collections', 'OrderedDict'), ('collections', 'defaultdict'), ('collections', 'Counter'),
    ('numpy', 'dtype'), ('numpy', 'ndarray'), ('numpy._core.multiarray', 'scalar'),
    ('numpy._core.multiarray', '_reconstruct'),
}


def _check_meta(meta):
    """ Checks the content of meta.pkl, of which training requires vocab_size alone. """
    vocab_size = meta['vocab_size']
    if not isinstance(vocab_size, (int, np.integer)) or not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f'vocab_size={vocab_size!r} must be from 1 to {MAX_VOCAB_SIZE:,} (uint16)')
    meta['vocab_size'] = int(vocab_size)
    spec = tokenizer_spec(meta)
    if spec is not None and spec['kind'] == 'hf':
        get_tokenizer(spec)  # raises if it is damaged


def load_meta(dataset):
    """
    The content of a dataset's meta.pkl; None if the dataset has no meta.pkl. Raises UserError if
    the file is damaged, contains code, or has no vocab_size.
    """
    path = DATA_DIR / dataset / 'meta.pkl'
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file:
            meta = _PlainDataUnpickler(file).load()
        _check_meta(meta)
    except Exception as error:  # a damaged pickle raises any exception
        reason = f'{type(error).__name__}: {error}'
        raise UserError(f'{path} is not a vocabulary ({reason:.200}); '
                        'prepare the dataset again') from None
    return meta


def meta_of(spec, vocab_size):
    """ The content of meta.pkl for a tokenizer's spec; None for GPT-2's, which needs none. """
    if spec['kind'] == 'gpt2':
        return None
    if spec['kind'] == 'hf':
        return {'vocab_size': vocab_size, 'tokenizer': spec}
    itos = dict(enumerate(spec['itos']))
    stoi = {character: i for i, character in itos.items()}
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos}


def tokenizer_spec(meta):
    """ The inverse of `meta_of`: a tokenizer's spec; None if `meta` has no text for each id. """
    if meta is None or meta.get('tokenizer') == 'gpt2':  # a name, as others write it
        return {'kind': 'gpt2'}
    spec = meta.get('tokenizer')
    if isinstance(spec, dict) and spec.get('kind') == 'hf':
        return spec
    itos = meta.get('itos', {})  # a dict, a list or an array
    try:
        characters = [itos[i] for i in range(len(itos))]
        ''.join(characters)
    except (KeyError, TypeError):  # ids with gaps, or something other than text
        return None
    if not characters:
        return None
    return {'kind': 'char', 'itos': [str(character) for character in characters]}


def spec_of_checkpoint(checkpoint, vocab_size):
    """
    The spec of the tokenizer of a checkpoint, whose model has so many embeddings. nanoGPT's
    checkpoints have that of their dataset, which may be gone; None where it is unknown.
    """
    if checkpoint.get('tokenizer') is not None:
        return checkpoint['tokenizer']
    meta = load_meta(checkpoint.get('config', {}).get('dataset', ''))
    if meta is None and vocab_size not in GPT2_VOCAB_SIZES:
        return None
    return tokenizer_spec(meta)
