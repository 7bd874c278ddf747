"""
The Python that runs this, character by character: a dataset that needs no network.

Source: the .py files of Python's standard library as it is installed here (PSF licence), sorted by
relative path, at most 12 MB. Tests are left out, and so are files with anything but the newline and
the 95 printable characters of ASCII; these 96 are the vocabulary.
Split: the first 90% of the characters for training, the last 10% for validation.
Should measure: about 11 million characters, more or fewer from one Python version to the next.
"""
import platform
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from texts import preparing, write_bins  # noqa: E402

# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

    vocabulary = '\n' + ''.join(map(chr, range(32, 127)))
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}
    most = 12_000_000

    with preparing(FOLDER):
        library = Path(sysconfig.get_path('stdlib'))
        paths = [path.relative_to(library) for path in library.rglob('*.py')]
        paths = sorted(path.as_posix() for path in paths if not left_out & set(path.parts))
        texts, size = [], 0
        for path in paths:
            text = (library / path).read_text(encoding='utf-8', errors='replace')  # line ends become newlines
            if not set(text) <= set(vocabulary):
                continue
            if size + len(text) > most:
                break
            texts.append(text)
            size += len(text)
        text = ''.join(texts)
        cut = int(size * 0.9)
        if not text:
            raise ValueError(f'this Python has no source files under {library}')
        print(f'Python {platform.python_version()}: {len(texts):,} of {len(paths):,} files')
        print(f'SHA-256 of the text: {sha256(text.encode()).hexdigest()}')
        write_bins(FOLDER, {'train': [text[:cut]], 'val': [text[cut:]]},
                   {'kind': 'char', 'itos': list(vocabulary)}, size)
