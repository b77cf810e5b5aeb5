"""GGUF files that tests write: tiny decoders with a tiny byte-level vocabulary."""

import functools
import inspect
import json
import textwrap

import numpy as np

from tests.data.corpus import CHINESE

CONTROL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are terse<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    'model.embed_tokens.weight': 'token_embd.weight',
    'model.norm.weight': 'output_norm.weight',
    'lm_head.weight': 'output.weight',
    'model.layers.': 'blk.',
    '.input_layernorm.': '.attn_norm.',
    '.post_attention_layernorm.': '.ffn_norm.',
    '.self_attn.q_proj.': '.attn_q.',
    '.self_attn.k_proj.': '.attn_k.',
    '.self_attn.v_proj.': '.attn_v.',
    '.self_attn.o_proj.': '.attn_output.',
    '.mlp.gate_proj.': '.ffn_gate.',
    '.mlp.up_proj.': '.ffn_up.',
    '.mlp.down_proj.': '.ffn_down.',
}


@functools.cache
def trained(size=512, control=CONTROL):
    """A byte-level BPE of the library `tokenizers`, trained on code and Chinese."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(textwrap), *CHINESE], trainer)
    return tokenizer


def vocabulary(size=512):
    """Settings of a vocabulary as GGUF files hold it."""
    model = json.loads(trained(size).to_str())['model']
    tokens = sorted(model['vocab'], key=model['vocab'].get)
    return {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': 'smollm',
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': [3 if token in CONTROL else 1 for token in tokens],
        'tokenizer.ggml.merges': [' '.join(merge) for merge in model['merges']],
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.padding_token_id': 2,
        'tokenizer.ggml.add_bos_token': False,
        'tokenizer.chat_template': TEMPLATE,
    }


def architecture(config):
    """Settings of a decoder as GGUF files hold it."""
    return {
        'llama.block_count': config.layers,
        'llama.context_length': config.context,
        'llama.embedding_length': config.dim,
        'llama.feed_forward_length': config.ffn,
        'llama.attention.head_count': config.heads,
        'llama.attention.head_count_kv': config.kv_heads,
        'llama.attention.key_length': config.head_dim,
        'llama.rope.dimension_count': config.head_dim,
        'llama.rope.freq_base': config.rope_theta,
        'llama.attention.layer_norm_rms_epsilon': config.norm_eps,
        'llama.vocab_size': config.vocab,
    }


def tensors_of(theirs, config):
    """Tensors as GGUF files name and order them, from those of Hugging Face."""

    def interleaved(w, heads):
        # Half-split rows 0..H/2 and H/2..H of each head become pairs, one after the other.
        H, D = w.shape[0] // heads, w.shape[1]
        pairs = np.stack([w.reshape(heads, H, D)[:, i // 2 + i % 2 * (H // 2)] for i in range(H)])
        return np.ascontiguousarray(pairs.transpose(1, 0, 2)).reshape(w.shape)

    tensors = {}
    for name, w in theirs.items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        heads = {'attn_q': config.heads, 'attn_k': config.kv_heads}.get(name.split('.')[-2])
        tensors[name] = interleaved(w, heads) if heads else w
    return tensors


def write(path, tensors, settings, *, architecture='llama', kinds=()):
    """A GGUF file; `kinds` are types of quantisation by tensor. None leaves a setting out."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add |= {bool: writer.add_bool, list: writer.add_array}
    for name, value in settings.items():
        if value is not None:
            add[type(value)](name, value)
    kinds = dict(kinds)
    for name, w in tensors.items():
        if name in kinds:
            writer.add_tensor(name, gguf.quantize(w, kinds[name]), raw_dtype=kinds[name])
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(path, config, params):
    """config.json and model.safetensors of a Hugging Face model, by the library of that format."""
    from safetensors.numpy import save_file

    from llama_jax.convert import huggingface, huggingface_config

    path.mkdir(parents=True, exist_ok=True)
    settings = huggingface_config.config_to_huggingface(config)
    (path / 'config.json').write_text(json.dumps(settings))
    tensors = huggingface.params_to_huggingface(params, config)
    save_file(tensors, path / 'model.safetensors', metadata={'format': 'pt'})


def directory(path, config, params, size=512):
    """A Hugging Face model of these parameters, with the tokenizer of `trained` and TEMPLATE."""
    weights(path, config, params)
    trained(size).save(str(path / 'tokenizer.json'))
    named = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'chat_template': TEMPLATE}
    (path / 'tokenizer_config.json').write_text(json.dumps(named))
    return path
