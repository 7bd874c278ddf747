"""
Prompts a trained model and prints what it writes.

    python sample.py --out_dir=out-python-char --start="def "
    python sample.py --init_from=gpt2-xl --start="What is AI?" --num_samples=5
    python sample.py --start=FILE:prompt.txt

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import os
from pathlib import Path

import torch

from bins import get_tokenizer, hf_record, load_meta, one_line_errors, tokenizer_record
from checkpoint import load_checkpoint, load_weights
from checks import check_sample
from machine import choose_device, use_device
from model import GPT, GPT2_NAMES, GPTConfig

# -----------------------------------------------------------------------------
init_from = 'resume'   # resume: out_dir/ckpt.pt; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a Hugging Face
                       # directory, or namespace/name on the hub; or a checkpoint file
out_dir = 'out'        # folder of ckpt.pt
start = '\n'           # the prompt; FILE:prompt.txt reads one
num_samples = 10
max_new_tokens = 500   # tokens to draw, for each sample
temperature = 0.8      # below 1.0: likely tokens more often; above: less often
top_k = 200            # draw among so many of the likeliest tokens; 0: among all
seed = 1337
device = 'auto'        # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'         # float32, bfloat16 or float16; auto: 16 bits on CUDA and x86 with bfloat16
compile = False        # torch.compile: minutes at first, then faster
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile)
    check_sample({key: globals()[key] for key in config_keys})  # noqa: F821
    if start.startswith('FILE:'):
        try:
            start = Path(start[5:]).read_text(encoding='utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'{start[5:]} is not in UTF-8: {error}') from None

    # the model, and the tokenizer that it was trained with
    path = os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from
    if init_from == 'resume' or init_from not in GPT2_NAMES and (
            os.path.isfile(init_from) or init_from.endswith('.pt')):
        checkpoint = load_checkpoint(path)
        model = GPT(GPTConfig(**checkpoint['model_args']))
        load_weights(model, checkpoint, path)
        dataset = checkpoint.get('config', {}).get('dataset')
        record = checkpoint.get('tokenizer') or tokenizer_record(load_meta(dataset) if dataset else None)
        if record is None or record['kind'] == 'gpt2' and model.config.vocab_size < 50257:
            raise ValueError(f'{path} has a vocabulary of {model.config.vocab_size}, and the characters '
                             f"are not in data/{dataset}/meta.pkl; run that dataset's prepare.py")
    else:
        model = GPT.from_pretrained(init_from)
        bare = os.path.isdir(init_from) and not any(
            os.path.exists(os.path.join(init_from, name)) for name in ('tokenizer.json', 'vocab.json'))
        record = {'kind': 'gpt2'} if bare or init_from in GPT2_NAMES else hf_record(init_from)
    encode, decode, vocab_size, _ = get_tokenizer(record)

    prompt = encode(start, special=True)
    if not len(prompt):
        raise ValueError('the prompt is empty; give it a character at least, as in --start="A"')
    if max(prompt) >= model.config.vocab_size:
        raise ValueError(f'the prompt has token {max(prompt)}, and the model only {model.config.vocab_size}')

autocast = use_device(device, dtype)
print(f'device: {device}, {dtype}, {"compiled" if compile else "not compiled"}')
torch.manual_seed(seed)
model.eval().to(device)
if compile:
    model.compile()  # in place, so that generate() runs the compiled one

idx = torch.tensor([list(prompt)], dtype=torch.long, device=device)  # (1, T)
for _ in range(num_samples):
    with autocast:
        tokens = model.generate(idx, max_new_tokens, temperature, top_k, vocab_size)
    print(decode(tokens[0].tolist()))
    print('-' * 15, flush=True)
