"""
Hugging Face: loads GPT-2 weights; converts a trained GPT, its tokenizer, and a model card.

Not here: what init_from names (pretrained.py); how an export is checked and written (export.py).
"""
import base64
import logging
import os
import tempfile
from pathlib import Path

import torch

from components.errors import UserError
from components.tokenizer import GPT2_VOCAB_SIZES, has_tokenizer, hf_spec

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GELU_FORMS = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
CONV1D_WEIGHTS = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')


def transpose_conv1d(name, weight):
    """ Transposes a weight that Hugging Face keeps in a Conv1D (in, out), this GPT in a Linear. """
    if name.endswith(CONV1D_WEIGHTS):
        return weight.t()
    return weight


# -----------------------------------------------------------------------------
# loading GPT-2 weights

def load_gpt2(model_type):
    """
    Loads GPT-2's weights from the hub, or from a directory that transformers can read.

    model_type: one of GPT2_NAMES, a directory, or 'namespace/name' on the hub

    Returns dict of arguments for GPTConfig, and the weights of that GPT, {name: float32 tensor}.
    Raises UserError if there is no such model, if its files are broken, or if its configuration
    asks for what this GPT does not compute.
    """
    name = find_name(model_type)
    hf_config = read_config(name)
    check_config(hf_config, name)
    hf_weights = read_weights(name)
    weights = {key: transpose_conv1d(key, weight) for key, weight in hf_weights.items()}
    model_args = dict(
        block_size=hf_config.n_positions,
        vocab_size=hf_config.vocab_size,
        n_layer=hf_config.n_layer,
        n_head=hf_config.n_head,
        n_embd=hf_config.n_embd,
        bias=True,
        gelu=GELU_FORMS[hf_config.activation_function],
    )
    return model_args, weights


def find_name(model_type):
    """ The directory or the name on the hub that `model_type` stands for. Raises UserError. """
    if model_type in GPT2_NAMES:
        return find_gpt2(model_type)
    if os.path.isdir(model_type):
        if not os.path.exists(os.path.join(model_type, 'config.json')):
            raise UserError(f'{model_type} has neither a ckpt.pt nor the config.json of a Hugging '
                            'Face model; choose another directory')
        return model_type
    if model_type.count('/') != 1:
        names = ', '.join(GPT2_NAMES)
        raise UserError(f'unknown model {model_type!r}; it is not one of {names}, not a directory '
                        'or checkpoint that exists, and not namespace/name on the hub')
    return model_type


def find_gpt2(model_type):
    """ The name on the hub of one of GPT2_NAMES. """
    from huggingface_hub import try_to_load_from_cache
    # nanoGPT downloads GPT-2 under its old name, without a namespace. transformers would prefer a
    # directory of that name, which is not meant.
    cached_config = try_to_load_from_cache(model_type, 'config.json')
    if isinstance(cached_config, str) and not os.path.isdir(model_type):
        return model_type
    return f'openai-community/{model_type}'


def read_config(name):
    """ The configuration of a directory or of a name on the hub. Raises UserError. """
    from transformers import AutoConfig
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # no warning for each retry
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file can raise anything
        reason = str(error).strip().split('\n')[0]
        raise UserError(f'cannot load {name!r} from this machine or from the hub ({reason:.200}); '
                        'it requires a network, or a directory with config.json and '
                        'model.safetensors') from None


def check_config(hf_config, name):
    """ Raises UserError if the configuration asks for what this GPT does not compute. """
    if hf_config.model_type != 'gpt2':
        raise UserError(f'{name}: model_type={hf_config.model_type!r} is unsupported; '
                        "only 'gpt2' can be loaded")
    supported = {
        'activation_function': tuple(GELU_FORMS),
        'layer_norm_epsilon': (1e-5,),
        'n_inner': (None, 4 * hf_config.n_embd),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'tie_word_embeddings': (True,),
        'add_cross_attention': (False,),
    }
    for field, values in supported.items():
        value = getattr(hf_config, field)
        if value not in values:
            choices = ' or '.join(map(repr, values))
            raise UserError(f'{name}: {field}={value!r} is unsupported by this model; '
                            f'only {choices} can be loaded')


def read_weights(name):
    """ The weights of a GPT-2: {name: float32 tensor}. Raises UserError. """
    from transformers import GPT2LMHeadModel
    try:
        hf_model, info = GPT2LMHeadModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a broken file can raise anything
        raise UserError(f'{name}: its weights cannot be read: {error!s:.200}') from None
    if info['missing_keys']:
        missing = ', '.join(sorted(info['missing_keys']))
        raise UserError(f'{name} lacks the weights {missing:.200}')
    return hf_model.state_dict()


def load_gpt2_spec(name, vocab_size):
    """
    The spec (see tokenizer.py) of the tokenizer of a model that load_gpt2() loads; None if it has
    none, and its vocabulary is not GPT-2's. Raises UserError if it cannot be read.
    """
    if name in GPT2_NAMES:
        return {'kind': 'gpt2'}
    if os.path.isdir(name) and not has_tokenizer(name):
        return {'kind': 'gpt2'} if vocab_size in GPT2_VOCAB_SIZES else None
    return hf_spec(name)


# -----------------------------------------------------------------------------
# converting a trained GPT

def to_gpt2(model, vocab_size, end_of_text):
    """
    Converts a GPT of GPT-2's architecture to a GPT2LMHeadModel.

    vocab_size: number of tokens of the tokenizer; embeddings of later ids, the padding, are left
        out
    end_of_text: id of the token that ends a text, or None
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    config = model.config
    activation = {'exact': 'gelu', 'tanh': 'gelu_new'}
    hf_model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function=activation[config.gelu],
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    ))
    weights = model.state_dict()
    hf_weights = {}
    for name, parameter in hf_model.state_dict().items():
        if name in weights:
            hf_weights[name] = transpose_conv1d(name, weights[name])
        else:
            assert name.endswith('.bias'), f'{name} is missing'
            hf_weights[name] = torch.zeros_like(parameter)  # the model has bias=False
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        hf_weights[name] = hf_weights[name][:vocab_size]                        # (vocab_size, C)
    hf_model.load_state_dict(hf_weights)
    return hf_model


def to_nanochat(model, vocab_size, end_of_text):
    """
    Converts a GPT with rotary, rmsnorm, qk_norm and untied, and without biases, to a
    NanoChatForCausalLM. The arguments are those of `to_gpt2`.
    """
    from transformers import NanoChatConfig, NanoChatForCausalLM
    config = model.config
    activation = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh'}
    hf_model = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.block_size,
        hidden_act=activation[config.gelu],
        rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base},
        final_logit_softcapping=None,
        attention_dropout=config.dropout,
        pad_token_id=None,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    ))
    hf_weights = {
        'model.embed_tokens.weight': model.transformer.wte.weight[:vocab_size], # (vocab_size, C)
        'lm_head.weight': model.lm_head.weight[:vocab_size],                    # (vocab_size, C)
    }
    for i, block in enumerate(model.transformer.h):
        q, k, v = block.attn.c_attn.weight.chunk(3)                             # (C, C) each
        layer = f'model.layers.{i}'
        hf_weights[f'{layer}.self_attn.q_proj.weight'] = q
        hf_weights[f'{layer}.self_attn.k_proj.weight'] = k
        hf_weights[f'{layer}.self_attn.v_proj.weight'] = v
        hf_weights[f'{layer}.self_attn.o_proj.weight'] = block.attn.c_proj.weight
        hf_weights[f'{layer}.mlp.fc1.weight'] = block.mlp.c_fc.weight
        hf_weights[f'{layer}.mlp.fc2.weight'] = block.mlp.c_proj.weight
    hf_model.load_state_dict({name: weight.detach() for name, weight in hf_weights.items()})
    return hf_model


def to_tokenizer(spec, block_size):
    """
    Converts the spec of a tokenizer (see tokenizer.py) to a PreTrainedTokenizerFast, for a model
    of context length `block_size`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    special_tokens = {}
    if spec['kind'] == 'char':
        tokenizer = character_tokenizer(spec['itos'])
    elif spec['kind'] == 'hf':
        tokenizer = Tokenizer.from_str(spec['json'])
        if spec['end'] is not None:
            special_tokens['eos_token'] = tokenizer.id_to_token(spec['end'])
    else:
        tokenizer = gpt2_tokenizer()
        for name in ('bos_token', 'eos_token', 'unk_token'):  # as in OpenAI's files
            special_tokens[name] = '<|endoftext|>'
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def character_tokenizer(itos):
    """ A tokenizers.Tokenizer of the characters `itos`, in the order of their ids. """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    vocabulary = {character: i for i, character in enumerate(itos)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    any_character = Regex(r'[\s\S]')  # a dot would not match a newline
    tokenizer.pre_tokenizer = pre_tokenizers.Split(any_character, 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def gpt2_tokenizer():
    """ GPT-2's BPE, converted from tiktoken to a tokenizers.Tokenizer. """
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter
    bpe = tiktoken.get_encoding('gpt2')
    lines = []
    for token, rank in bpe._mergeable_ranks.items():
        lines.append(base64.b64encode(token) + b' %d\n' % rank)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'ranks')
        path.write_bytes(b''.join(lines))
        converter = TikTokenConverter(
            str(path), bpe._pat_str, extra_special_tokens=bpe._special_tokens)
        return converter.converted()


def model_card(checkpoint, model, name):
    """
    The text of README.md: the size of a GPT, its loss, and the settings it was trained with.
    `checkpoint` is the dict of load_checkpoint(), `name` the title.
    """
    config = checkpoint.get('config', {})
    lines = [
        '---',
        'library_name: transformers',
        '---',
        f'# {name}',
        '',
        f'{model.get_num_params() / 1e6:.2f} million parameters, '
        f'{checkpoint.get("iter_num")} iterations on',
        f'`{config.get("dataset")}`, best validation loss '
        f'{checkpoint["best_val_loss"]:.4f} nats per token.',
        '',
        '| setting | value |',
        '|---|---|',
    ]
    for key, value in config.items():
        lines.append(f'| {key} | `{value!r}` |')
    return '\n'.join(lines) + '\n'
