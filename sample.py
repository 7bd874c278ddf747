"""
Prompts a trained model and prints what it writes.

    python sample.py --out_dir=out-python-char --start="def "
    python sample.py --init_from=gpt2-xl --start="What is AI?" --num_samples=5 --stream=True
    python sample.py --start=LINES:prompts.txt --num_samples=1 --temperature=0 --out=samples.jsonl

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import json
import os
from contextlib import suppress
from itertools import count

import numpy as np
import torch

from bins import get_tokenizer, hf_record, load_meta, one_line_errors, tokenizer_record, whole_file
from checkpoint import load_checkpoint, load_weights, newest_checkpoint
from checks import check_sample, has_tokenizer
from decode import complete, fitting, lighten, read_prompts
from machine import choose_device, free_memory, use_device
from model import GPT, GPT2_NAMES, GPTConfig

# -----------------------------------------------------------------------------
init_from = 'resume'   # resume: out_dir/ckpt.pt; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a Hugging Face
                       # directory, or namespace/name on the hub; or a checkpoint file
out_dir = 'out'        # folder of ckpt.pt
start = '\n'           # the prompt; FILE:prompt.txt reads one, - standard input; FILES:*.txt reads one
                       # from each file, LINES:prompts.txt from each line
num_samples = 10       # of each prompt
max_new_tokens = 500   # tokens to draw, for each sample
stop = ''              # a sample ends before this text; '': at max_new_tokens
past_block = 'exact'   # beyond block_size tokens read the last ones anew for each token; half: anew when a
                       # block is full, from its last half, far faster; roll: never, for rotary models
# which token is drawn
temperature = 0.8      # below 1.0: likely tokens more often; above: less often; 0: always the likeliest
top_k = 200            # draw among so many of the likeliest tokens; 0: among all
top_p = 1.0            # among the fewest of them that hold this much of the probability; 1.0: all
min_p = 0.0            # among those with this share of the likeliest one's probability; 0.0: all
repetition_penalty = 1.0  # above: tokens that the text has are less likely; 1.0: they are not
seed = 1337            # with the number of a sample decides its draws, whatever is drawn beside it
# how
stream = False         # print tokens as they come, one sample after another
interactive = False    # ask for prompts, a sample of each, until Ctrl-D
out = ''               # also write the samples to this file: a line of JSON each; '': not
device = 'auto'        # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'         # of the weights: float32, bfloat16 or float16; auto: 16 bits on CUDA and x86
quantize = ''          # int8: weights in 8 bits, on an x86 CPU; '': in dtype
compile = False        # torch.compile: minutes at first, then faster on a GPU
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())


def tokenize(text):
    """ The ids of a prompt. Raises ValueError where the model can't read it. """
    ids = [int(i) for i in encode(text, special=True)]
    if not ids:
        raise ValueError('the prompt is empty; give it a character at least, as in --start="A"')
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f'the prompt has token {max(ids)}, and the model only {model.config.vocab_size}')
    return ids


with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile, training=False)
    check_sample({key: globals()[key] for key in config_keys})  # noqa: F821
    texts = [] if interactive else read_prompts(start)

    # the model, and the tokenizer that it was trained with
    path = newest_checkpoint(out_dir, best=True) if init_from == 'resume' else init_from
    if init_from == 'resume' or init_from not in GPT2_NAMES and (
            os.path.isfile(init_from) or init_from.endswith('.pt')):
        checkpoint = load_checkpoint(path, mmap=os.name == 'posix')  # Windows keeps what is mapped
        model = GPT(GPTConfig(**checkpoint['model_args']))
        load_weights(model, checkpoint, path)
        dataset = checkpoint.get('config', {}).get('dataset')
        record = checkpoint.get('tokenizer') or tokenizer_record(load_meta(dataset) if dataset else None)
        if record is None or record['kind'] == 'gpt2' and model.config.vocab_size < 50257:
            raise ValueError(f'{path} has a vocabulary of {model.config.vocab_size} and no tokenizer, nor '
                             f'are stoi and itos in the meta.pkl of dataset={dataset}; run its prepare.py')
    else:
        model = GPT.from_pretrained(init_from)
        bare = os.path.isdir(init_from) and not has_tokenizer(init_from)
        record = {'kind': 'gpt2'} if bare or init_from in GPT2_NAMES else hf_record(init_from)
    encode, decode, vocab_size, _ = get_tokenizer(record)
    if past_block == 'roll' and not model.config.rotary:
        raise ValueError("past_block='roll' takes rotary positions, not a table; --past_block=half")
    prompts = [tokenize(text) for text in texts]

use_device(device, dtype)
model.eval().to(device)
lighten(model, getattr(torch, dtype), quantize == 'int8')
print(f'device: {device}, {quantize or dtype}, {"compiled" if compile else "not compiled"}')
if compile:
    model.compile()  # in place


samples = {}  # by their numbers


def add_samples(numbers, prompts, show=False):
    """ Continues lists of ids as the samples of these numbers, each with draws of its own -> their texts. """
    draws = [np.random.default_rng((seed, number)).random(max_new_tokens, np.float32) for number in numbers]
    texts, counts, seconds = complete(
        model, decode, prompts, torch.from_numpy(np.stack(draws)), stop, show, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, past_block=past_block,
        vocab_size=vocab_size)
    for number, ids, text, tokens in zip(numbers, prompts, texts, counts):
        samples[number] = dict(prompt=decode(ids), text=text, tokens=tokens, seconds=seconds)
    if out:
        lines = [json.dumps(sample) + '\n' for _, sample in sorted(samples.items())]
        with whole_file(out) as temporary:
            temporary.write_text(''.join(lines), encoding='utf-8')
    return texts


if interactive:
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys; not on Windows
    for number in count():
        try:
            add_samples([number], [tokenize(input('> '))], show=True)
        except (ValueError, OSError) as error:
            print(f'sample.py: {error}')
        except KeyboardInterrupt:  # ends the sample
            print()
        except EOFError:
            print()
            break

# batches: prompts that stay within the block together, others by length, as the longest decides what is read
todo = [ids for ids in prompts for _ in range(num_samples)]
within = model.config.block_size - max_new_tokens
kinds = [0 if stream or len(ids) <= within else len(ids) for ids in todo]
for kind in sorted(set(kinds)):
    numbers = [number for number in range(len(todo)) if kinds[number] == kind]
    longest = max(len(todo[number]) for number in numbers) + max_new_tokens
    at_once = 1 if stream else fitting(model, longest, free_memory(device.partition(':')[0]) / 2)
    for i in range(0, len(numbers), at_once):
        batch = [todo[number] for number in numbers[i:i + at_once]]
        if stream:
            print(decode(batch[0]), end='', flush=True)
        with one_line_errors():
            texts = add_samples(numbers[i:i + at_once], batch, show=stream)
        for ids, text in zip(batch, texts):
            print('' if stream else decode(ids) + text + '\n', '-' * 15, sep='', flush=True)
