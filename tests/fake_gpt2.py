"""
The fixture `gpt2`: a tokenizer that splits text as GPT-2's does, with a handful of its merges. It
takes the place of GPT-2's, which has to be downloaded.
"""
import numpy as np
import pytest
import tiktoken

# Every Python that starts runs sitecustomize.py, worker processes included
SITECUSTOMIZE = r'''
import tiktoken, tiktoken.registry
tokens = [bytes([i]) for i in range(256)]
tokens += [b'\n\n', b' t', b'he', b' the', b'\n ', b'th', b' a', b'  ']
tokens += [b'\xff%d' % i for i in range(len(tokens), 50256)]  # in no text
tiktoken.registry.ENCODINGS['gpt2'] = tiktoken.Encoding('gpt2',
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={token: i for i, token in enumerate(tokens)},
    special_tokens={'<|endoftext|>': 50256})
'''


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """ The tokenizer, as GPT-2's in this process and in all that it starts. """
    site = tmp_path / 'site'
    site.mkdir()
    (site / 'sitecustomize.py').write_text(SITECUSTOMIZE)
    monkeypatch.setenv('PYTHONPATH', str(site))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    exec(SITECUSTOMIZE)
    return tiktoken.get_encoding('gpt2')


def prose(num_characters, seed=0):
    """ About so many characters of words, blank lines, runs of spaces and non-ASCII letters. """
    words = ['the ', 'cat', '\n', '\n\n', ' sat', '  ', '\u00e9t\u00e9 ', "it's ", '42', '!', '\t']
    indices = np.random.default_rng(seed).integers(len(words), size=num_characters // 3)
    return ''.join(words[i] for i in indices)
