"""
The source of Python's standard library, one token per character: a dataset that needs no network.

Source: the .py files of the Python that runs this script (PSF license), sorted by relative path, at
most 12 million characters. The vocabulary is the newline and the 95 printable characters of ASCII.
Tests and files with other characters are left out.
Split: the first 90% of the characters for training, the last 10% for validation.
Expected: about 11 million characters; the number differs between versions of Python.
"""
import platform
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.errors import UserError  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

VOCABULARY = ['\n', *map(chr, range(32, 127))]
EXCLUDED_FOLDERS = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
MAX_CHARACTERS = 12_000_000


def find_source_files(library):
    """ The paths of the .py files in the folder `library`, relative to it, sorted. """
    paths = [path.relative_to(library) for path in library.rglob('*.py')]
    return sorted(path.as_posix() for path in paths if not EXCLUDED_FOLDERS & set(path.parts))


def read_source_files(library, paths):
    """ The texts of the files that have only characters of VOCABULARY, up to MAX_CHARACTERS. """
    texts = []
    num_characters = 0
    for path in paths:
        text = (library / path).read_text(encoding='utf-8', errors='replace')
        if not set(text) <= set(VOCABULARY):
            continue
        num_characters += len(text)
        if num_characters > MAX_CHARACTERS:
            break
        texts.append(text)
    return texts


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    with preparing(FOLDER):
        library = Path(sysconfig.get_path('stdlib'))
        paths = find_source_files(library)
        texts = read_source_files(library, paths)
        if not texts:
            raise UserError(f'this Python has no source files in {library}')
        text = ''.join(texts)
        print(f'Python {platform.python_version()}: {len(texts):,} of {len(paths):,} files')
        print(f'SHA-256 of the text: {sha256(text.encode()).hexdigest()}')

        num_train = int(len(text) * 0.9)
        splits = {'train': [text[:num_train]], 'val': [text[num_train:]]}
        write_bins(FOLDER, splits, {'kind': 'char', 'itos': VOCABULARY}, len(text))
