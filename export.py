"""
Exports a checkpoint to a Hugging Face directory: weights, tokenizer, and a card with its settings.

    python export.py --out_dir=out-python-char --hf_dir=out-python-char/hf

GPT-2's architecture becomes a GPT2LMHeadModel; a model with rotary, rmsnorm, qk_norm and untied, a
NanoChatForCausalLM.
"""
import os
import shutil
from pathlib import Path

import torch

from components.checkpoint import args_beyond_nanogpt
from components.errors import UserError, one_line_errors
from components.huggingface import model_card, to_gpt2, to_nanochat, to_tokenizer
from components.pretrained import find_model, load_model, load_tokenizer_spec
from components.tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # folder of ckpt.pt
hf_dir = ''      # the new folder; '': hf in out_dir
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

NANOCHAT_ARGS = ('rotary', 'rmsnorm', 'qk_norm', 'untied')


def choose_conversion(config, path):
    """ to_gpt2 or to_nanochat. Raises UserError if transformers has no class for this model. """
    args = args_beyond_nanogpt(config)
    args.pop('rope_base', None)  # a NanoChatConfig has it, too
    if not args:
        return to_gpt2
    if set(args) == set(NANOCHAT_ARGS) and not config.bias:
        return to_nanochat
    raise UserError(f'{path} has {", ".join(args)} and bias={config.bias}; transformers has a '
                    f'model class for {", ".join(NANOCHAT_ARGS)} together without biases, and one '
                    'for none of them')


@torch.inference_mode()
def compare_logits(model, folder, vocab_size):
    """ The largest difference between the logits of `model` and of the model saved in `folder`. """
    from transformers import AutoModelForCausalLM
    idx = torch.randint(vocab_size, (2, model.config.block_size))               # (B, T)
    logits, _ = model(idx, idx)                                                 # (B, T, V)
    logits = logits[..., :vocab_size]
    hf_logits = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
    return (logits - hf_logits).abs().max().item()


def flush(folder):
    """ Flushes all files in `folder` to the disk. """
    for path in folder.iterdir():
        with open(path, 'rb+') as file:
            os.fsync(file.fileno())


with one_line_errors():
    if not hf_dir:
        hf_dir = os.path.join(out_dir, 'hf')
    hf_dir = os.path.normpath(hf_dir)
    if os.path.exists(hf_dir):
        raise UserError(f'{hf_dir} exists already; remove it, or choose another --hf_dir')

    # load the model and its tokenizer
    location = find_model('resume', out_dir)
    model, checkpoint = load_model(location, mmap=True)
    model.eval()
    convert = choose_conversion(model.config, location.name)
    spec = load_tokenizer_spec(location, model, checkpoint, required=False)
    vocab_size = model.config.vocab_size
    end_of_text = None
    tokenizer_note = 'without a tokenizer'
    if spec is not None:
        tokenizer = get_tokenizer(spec)
        vocab_size = tokenizer.vocab_size
        end_of_text = tokenizer.end_of_text
        tokenizer_note = 'with a tokenizer'
    if vocab_size > model.config.vocab_size:
        raise UserError(f'{location.name}: its tokenizer has {vocab_size} tokens, and its model '
                        f'has embeddings for {model.config.vocab_size}')

    for line in config_overrides:  # noqa: F821  configurator.py sets it
        print(line)

    # write everything to a temporary directory, compare the logits, and rename it
    from transformers import logging
    logging.disable_progress_bar()
    temporary = Path(f'{hf_dir}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted run
    try:
        hf_model = convert(model, vocab_size, end_of_text)
        # a GPT-2 cannot generate past block_size, and the prompt needs room as well
        hf_model.generation_config.max_new_tokens = model.config.block_size // 2
        hf_model.save_pretrained(temporary)
        if spec is not None:
            to_tokenizer(spec, model.config.block_size).save_pretrained(temporary)
        card = model_card(checkpoint, model, Path(hf_dir).name)
        (temporary / 'README.md').write_text(card, encoding='utf-8')

        difference = compare_logits(model, temporary, vocab_size)
        assert difference < 1e-3, f'the logits differ by {difference}'
        flush(temporary)
        temporary.rename(hf_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

print(f'{hf_dir}: {type(hf_model).__name__}, {vocab_size} tokens, {tokenizer_note}; '
      f'logits differ by at most {difference:.1e}')
