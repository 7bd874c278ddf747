"""
Makes a Hugging Face directory of a checkpoint: weights, tokenizer, and a card that says how it was trained.

    python export.py --out_dir=out-python-char --hf_dir=out-python-char/hf

The classic model becomes a GPT2LMHeadModel; rotary, rmsnorm, qk_norm and untied, a NanoChatForCausalLM.
"""
import base64
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch

from bins import get_tokenizer, load_meta, one_line_errors, tokenizer_record
from checkpoint import load_checkpoint, load_weights, newer_args, newest_checkpoint
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
out_dir = 'out'  # folder of ckpt.pt
hf_dir = ''      # the new folder; '': hf in out_dir
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())


def to_gpt2(model, vocab_size, end):
    """ The GPT as a GPT2LMHeadModel that knows the first `vocab_size` tokens. """
    from transformers import GPT2Config, GPT2LMHeadModel
    c, ours = model.config, model.state_dict()
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function='gelu' if c.gelu == 'exact' else 'gelu_new', resid_pdrop=c.dropout,
        embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=end, eos_token_id=end))
    weights = {}
    for name, p in theirs.state_dict().items():
        weight = ours.get(name, torch.zeros_like(p))  # the biases that ours may not have
        if name.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight')):
            weight = weight.t()  # their Conv1D keeps (in, out), a Linear (out, in)
        weights[name] = weight[:vocab_size] if 'wte' in name or 'lm_head' in name else weight
    theirs.load_state_dict(weights)
    return theirs


def to_nanochat(model, vocab_size, end):
    """ The GPT of the recipe as a NanoChatForCausalLM that knows the first `vocab_size` tokens. """
    from transformers import NanoChatConfig, NanoChatForCausalLM
    c = model.config
    theirs = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, pad_token_id=None,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, max_position_embeddings=c.block_size,
        hidden_act='gelu' if c.gelu == 'exact' else 'gelu_pytorch_tanh', final_logit_softcapping=None,
        attention_dropout=c.dropout, bos_token_id=end, eos_token_id=end))
    weights = {'model.embed_tokens.weight': model.transformer.wte.weight[:vocab_size],
               'lm_head.weight': model.lm_head.weight[:vocab_size]}
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.chunk(3)
        for name, weight in {'self_attn.q_proj': q, 'self_attn.k_proj': k, 'self_attn.v_proj': v,
                             'self_attn.o_proj': block.attn.c_proj.weight, 'mlp.fc1': block.mlp.c_fc.weight,
                             'mlp.fc2': block.mlp.c_proj.weight}.items():
            weights[f'model.layers.{i}.{name}.weight'] = weight
    theirs.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return theirs


def to_tokenizer(record, block_size):
    """ The tokenizer of a record of bins.py as one of transformers. """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    names = {}
    if record['kind'] == 'char':
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(record['itos'])}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        tokenizer.decoder = decoders.Fuse()
    elif record['kind'] == 'hf':
        tokenizer = Tokenizer.from_str(record['json'])
        names = {} if record['end'] is None else {'eos_token': tokenizer.id_to_token(record['end'])}
    else:
        import tiktoken
        bpe = tiktoken.get_encoding('gpt2')
        with tempfile.TemporaryDirectory() as folder:
            ranks = Path(folder, 'ranks')
            ranks.write_bytes(b''.join(base64.b64encode(token) + b' %d\n' % rank
                                       for token, rank in bpe._mergeable_ranks.items()))
            tokenizer = TikTokenConverter(str(ranks), bpe._pat_str, extra_special_tokens=bpe._special_tokens)
            tokenizer = tokenizer.converted()
        names = {name: '<|endoftext|>' for name in ('bos_token', 'eos_token', 'unk_token')}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=block_size,
                                   clean_up_tokenization_spaces=False, **names)


def card(checkpoint, model, name):
    """ The text of README.md: what the model is, how to load it, how it was trained. """
    config = checkpoint.get('config', {})
    return f"""---
library_name: transformers
---
# {name}

{model.get_num_params() / 1e6:.2f} million parameters, {checkpoint.get('iter_num')} iterations on
`{config.get('dataset')}`, best validation loss {checkpoint.get('best_val_loss', math.nan):.4f} nats a token.

| setting | value |
|---|---|
{"".join(f"| {key} | `{value!r}` |{chr(10)}" for key, value in config.items())}"""


with one_line_errors():
    hf_dir = os.path.normpath(hf_dir or os.path.join(out_dir, 'hf'))
    if os.path.exists(hf_dir):
        raise ValueError(f'{hf_dir} is there already; remove it, or name another --hf_dir')
    checkpoint = load_checkpoint(path := newest_checkpoint(out_dir, best=True), mmap=True)
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval()
    load_weights(model, checkpoint, path)
    newer, recipe = newer_args(model.config), ('rotary', 'rmsnorm', 'qk_norm', 'untied')
    if newer and (set(newer) != set(recipe) or model.config.bias):
        raise ValueError(f"{path} has {', '.join(newer)} and bias={model.config.bias}; transformers knows "
                         f"{', '.join(recipe)} together, without biases, or none of them")
    dataset = checkpoint.get('config', {}).get('dataset')
    record = checkpoint.get('tokenizer') or tokenizer_record(load_meta(dataset) if dataset else None)
    _, _, vocab_size, end = get_tokenizer(record) if record else (None, None, model.config.vocab_size, None)
    if vocab_size > model.config.vocab_size:  # GPT-2's, taken where nothing is known
        raise ValueError(f"{path} has no tokenizer, and data/{dataset}/meta.pkl is gone; run its prepare.py")

    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    temporary = Path(f'{hf_dir}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        theirs = (to_nanochat if newer else to_gpt2)(model, vocab_size, end)
        theirs.generation_config.max_new_tokens = model.config.block_size // 2  # GPT-2 ends at its block
        theirs.save_pretrained(temporary)
        if record:
            to_tokenizer(record, model.config.block_size).save_pretrained(temporary)
        (temporary / 'README.md').write_text(card(checkpoint, model, Path(hf_dir).name), encoding='utf-8')
        idx = torch.randint(vocab_size, (2, model.config.block_size))
        with torch.inference_mode():
            logits = AutoModelForCausalLM.from_pretrained(temporary)(idx).logits  # and unmaps the files
            difference = (model(idx, idx)[0][..., :vocab_size] - logits).abs().max().item()
        assert difference < 1e-3, f'the logits differ by {difference}'
        for file in temporary.iterdir():
            with open(file, 'rb+') as f:
                os.fsync(f.fileno())
        temporary.rename(hf_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
print(f'{hf_dir}: {type(theirs).__name__}, {vocab_size} tokens, '
      f'{"with" if record else "without"} a tokenizer; logits differ by at most {difference:.1e}')
