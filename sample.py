"""
Samples texts from a trained model.

    python sample.py --out_dir=out-python-char --start="def "
    python sample.py --init_from=gpt2-xl --start="What is AI?" --num_samples=5 --stream=True
    python sample.py --start=LINES:prompts.txt --num_samples=1 --temperature=0 --out=samples.jsonl

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import components  # noqa: F401, I001  before torch: it sets how CPU threads wait

import itertools
import json
import os
from contextlib import suppress

import numpy as np
import torch

from components.device import choose_device, describe_compile, free_memory, use_device
from components.errors import UserError, one_line_errors
from components.files import whole_file
from components.generation import complete, group_into_batches, read_prompts
from components.pretrained import find_model, load_model, load_tokenizer_spec
from components.quantization import quantize_linears
from components.settings import check_sample
from components.static_decoding import make_decoder
from components.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
init_from = 'resume'   # resume: out_dir/ckpt.pt; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a Hugging
                       # Face directory, or namespace/name on the hub; or a checkpoint file
out_dir = 'out'        # folder of ckpt.pt
start = '\n'           # the prompt; FILE:prompt.txt reads one from a file, - from standard input;
                       # FILES:*.txt reads one from each file, LINES:prompts.txt from each line;
                       # where a newline is no token, the default is the end-of-text or first token
num_samples = 10       # for each prompt
max_new_tokens = 500   # tokens of each sample
stop = ''              # a sample ends before this text; '': after max_new_tokens
past_block = 'exact'   # past block_size tokens, the model reads the last block_size, recomputed for
                       # each token; half: from half a block to a block with a KV cache, far faster
# the next token is sampled among
temperature = 0.8      # below 1.0: likely tokens more often; above: less often; 0: the most likely
top_k = 200            # this number of the most likely tokens; 0: all
top_p = 1.0            # the fewest most likely tokens with this total probability; 1.0: all
min_p = 0.0            # tokens with this fraction of the most likely one's probability; 0.0: all
seed = 1337            # with the number of a sample, decides its random numbers
# how
stream = False         # print each token as it is sampled, one sample after another
interactive = False    # ask for prompts and print a sample of each, until Ctrl-D
out = ''               # also write the samples to this file, one line of JSON each; '': off
device = 'auto'        # cuda, cuda:1, mps or cpu; auto: the first of these that is available
dtype = 'auto'         # of the weights: float32, bfloat16 or float16; auto: 16 bits on CUDA and x86
quantize = ''          # int8: dynamic int8 quantization, on an x86 CPU; '': off
compile = False        # torch.compile the step that samples a token: a minute first, then faster; a
                       # GPU replays that step as a CUDA graph, compiled or not
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())


def encode_prompt(text):
    """ The ids of a prompt. Raises UserError if the model cannot read it. """
    ids = tokenizer.encode(text, special=True)
    if not ids:
        raise UserError('the prompt is empty; it needs at least one character: --start="A"')
    if max(ids) >= model.config.vocab_size:
        raise UserError(f'the prompt has token {max(ids)}, and the vocabulary of the model has '
                        f'only {model.config.vocab_size} tokens')
    return ids


def default_prompt():
    """ The ids of a newline, or if the tokenizer has none the end-of-text or the first token. """
    with suppress(UserError):
        ids = encode_prompt('\n')
        if tokenizer.decode(ids) == '\n':
            return ids
    token = tokenizer.end_of_text
    if token is None or token >= model.config.vocab_size:
        token = 0
    print(f"start='\\n' is not in the vocabulary; starting with {tokenizer.decode([token])!r}")
    return [token]


# 1. the model, its tokenizer and the prompts
with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile, training=False)
    check_sample({key: globals()[key] for key in config_keys})  # noqa: F821
    texts = [] if interactive else read_prompts(start)
    location = find_model(init_from, out_dir, best=True)
    if location.kind == 'scratch':
        raise UserError('init_from=scratch names no trained model; use --init_from=resume')
    model, checkpoint = load_model(location, mmap=True)
    tokenizer = get_tokenizer(load_tokenizer_spec(location, model, checkpoint))
    checkpoint = None  # frees its memory
    prompts = [default_prompt() if text == '\n' else encode_prompt(text) for text in texts]

# 2. the model on the device
device_type = device.partition(':')[0]
use_device(device, dtype)
model.eval().to(device)
quantize_linears(model, getattr(torch, dtype), quantize == 'int8', compile)
weights = quantize if quantize else dtype
for line in config_overrides:  # noqa: F821  configurator.py sets it
    print(line)
print(f'device: {device}, {weights}, {describe_compile(compile)}')
decoder = make_decoder(model, compile)


# 3. sampling
samples = {}  # by the number of the sample


def sample_batch(numbers, prompts):
    """
    Samples a continuation of each prompt, and writes all samples so far to `out`.

    Args:
        numbers: a number for each sample, which decides its random numbers
        prompts: lists of ids of the same length
    """
    generators = [np.random.default_rng((seed, number)) for number in numbers]
    random_numbers = np.stack([g.random(max_new_tokens, np.float32) for g in generators])
    completions, seconds = complete(
        model, tokenizer, prompts, torch.from_numpy(random_numbers), stop, stream or interactive,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, past_block=past_block,
        vocab_size=tokenizer.vocab_size, decoder=decoder)
    for number, prompt, completion in zip(numbers, prompts, completions):
        samples[number] = dict(prompt=tokenizer.decode(prompt), text=completion.text,
                               tokens=completion.num_tokens, seconds=seconds)
    if out:
        lines = [json.dumps(samples[number]) + '\n' for number in sorted(samples)]
        with whole_file(out) as temporary:
            temporary.write_text(''.join(lines), encoding='utf-8')


def stream_samples(prompts):
    """ Prints the tokens of one sample after another. """
    for number, prompt in enumerate(prompts):
        print(tokenizer.decode(prompt), end='', flush=True)
        sample_batch([number], [prompt])
        print('-' * 15, flush=True)


def sample_in_batches(prompts):
    """ Prints a sample of each prompt, in this order, as soon as those before it are printed. """
    memory = free_memory(device_type) / 2
    num_printed = 0
    for numbers in group_into_batches(model, prompts, max_new_tokens, memory, decoder):
        sample_batch(numbers, [prompts[number] for number in numbers])
        while num_printed in samples:
            print(samples[num_printed]['prompt'] + samples[num_printed]['text'])
            print('-' * 15, flush=True)
            num_printed += 1


def sample_interactively():
    """ Asks for prompts and prints a sample of each, until Ctrl-D. Ctrl-C ends a sample. """
    with suppress(ImportError):  # Windows
        import readline  # noqa: F401  makes the arrow keys work in input()
    for number in itertools.count():
        try:
            prompt = encode_prompt(input('> '))
            sample_batch([number], [prompt])
        except (UserError, OSError) as error:
            print(f'sample.py: {error}')
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            break


with one_line_errors():
    repeated_prompts = [prompt for prompt in prompts for _ in range(num_samples)]
    if interactive:
        sample_interactively()
    elif stream:
        stream_samples(repeated_prompts)
    else:
        sample_in_batches(repeated_prompts)
