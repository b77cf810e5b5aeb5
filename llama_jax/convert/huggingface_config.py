"""config.json of Hugging Face models <-> ModelConfig.

A key is read; or it changes what the weights compute, and then one of its values does not, and the
others are refused; or it concerns training, sampling or the tool that wrote the file, and is passed
over. The tables below say which.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.convert import rope
from llama_jax.convert import tensors as tensors_lib
from llama_jax.convert.directory import UNQUANTISED
from llama_jax.convert.values import count, number, short
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.patterns import Dense, Pattern, Window

log = logging.getLogger(__name__)

_ARCHITECTURES = {'LlamaForCausalLM', 'LLaMAForCausalLM', 'MistralForCausalLM'}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    'llama': {'rms_norm_eps': 1e-6, 'max_position_embeddings': 2048},
    'mistral': {
        'rms_norm_eps': 1e-6,
        'max_position_embeddings': 131072,
        'num_key_value_heads': 8,
        'sliding_window': 4096,
    },
}
"""What transformers takes for a key that is not there, by model_type."""
_READ = {
    *('model_type', 'architectures', 'vocab_size', 'hidden_size', 'intermediate_size'),
    *('num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim'),
    *('rms_norm_eps', 'tie_word_embeddings', *rope.KEYS),
    *('sliding_window', 'use_sliding_window', 'layer_types'),
    *('max_sequence_length', 'quantization_config'),
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    'hidden_act': ('silu', 'swish'),
    'hidden_activation': ('silu', 'swish'),
    'rope_interleaved': (False,),
    'is_encoder_decoder': (False,),
    'transformers_weights': ('model.safetensors', 'model.safetensors.index.json'),
    'is_causal': (True,),
    'use_bidirectional_attention': (False,),
    'add_cross_attention': (False,),
    'chunk_size_feed_forward': (0,),
    'pruned_heads': ({},),
    **dict.fromkeys(
        (
            *('attention_bias', 'mlp_bias', 'qkv_bias', 'attention_out_bias', 'attn_bias'),
            *('use_bias', 'bias', 'add_bias_linear', 'add_qkv_bias', 'lm_head_bias'),
        ),
        (False,),
    ),
    **dict.fromkeys(('qk_norm', 'use_qk_norm', 'qk_layernorm', 'parallel_attn', 'alibi'), (False,)),
    **dict.fromkeys(
        (
            *('rotary_pct', 'embedding_multiplier', 'logit_scale'),
            *('residual_multiplier', 'logits_scaling', 'scale_emb', 'embedding_scale'),
        ),
        (1,),
    ),
    **dict.fromkeys(('num_experts', 'num_local_experts', 'n_routed_experts'), (0, 1)),
    **dict.fromkeys(
        (
            *('attn_logit_softcapping', 'final_logit_softcapping', 'query_pre_attn_scalar'),
            *('attention_multiplier', 'attention_chunk_size', 'no_rope_layers', 'scale_depth'),
            *('dim_model_base', 'text_config', 'vision_config', 'audio_config', 'mm_vision_tower'),
        ),
        (),
    ),
}
"""Keys with an effect -> the values that the decoder has. Null is one of them."""

_WITHOUT_EFFECT = re.compile(
    '|'.join(
        (
            # Which tool wrote the file, and for which.
            r'_.*|transformers.*|torch_dtype|dtype|torchscript|name_or_path|auto_map_.*|unsloth_.*',
            r'is_llama_config|onnx.*|model_max_length|tokenizer_class|processor_class|task.*',
            r'use_flash.*|attn_implementation|use_cache|use_bfloat16|tf_legacy_loss|fused_.*',
            r'pretraining_tp|tensor_parallel.*|gradient_checkpointing|use_return_dict|return_dict',
            r'output_attentions|output_hidden_states|keys_to_ignore_at_inference|base_model_.*',
            # Training.
            r'initializer_.*|.*dropout|.*_pdrop|.*dropout_prob|neftune.*|label_smoothing',
            r'attention_probs_dropout_prob|router_aux_loss_coef|use_unpad|freeze.*|tie_encoder_decoder',
            # Of a head for another task, which a causal language model does not have.
            r'id2label|label2id|num_labels|problem_type|finetuning_task|classifier_.*|is_decoder',
            r'cross_attention_hidden_size|prefix',
            # Tokens, and how transformers samples.
            r'(bos|eos|pad|sep|cls|unk|mask|decoder_start|forced_bos|forced_eos|image)_token_id',
            r'(max|min)_(length|new_tokens)|do_sample|temperature|top_[kph]|min_p|typical_p',
            r'(repetition|length|diversity|encoder_repetition|exponential_decay_length)_penalty',
            r'num_beams|num_beam_groups|num_return_sequences|early_stopping|penalty_alpha',
            r'(encoder_)?no_repeat_ngram_size|bad_words_ids|(begin_)?suppress_tokens|stop_strings',
            r'output_scores|return_dict_in_generate|remove_invalid_values|guidance_scale|max_time',
            r'renormalize_logits|sequence_bias|(epsilon|eta)_cutoff|low_memory|force_words_ids',
        )
    )
)


def config_from_huggingface(settings: Mapping[str, Any]) -> ModelConfig:
    """The architecture that config.json describes (of transformers 4 or 5).

    Raises UserError for a setting with an effect that the decoder does not have, and warns of those
    that nobody here knows.
    """
    kind = _kind(settings)
    _refuse(settings)
    # A null is a value: without the key Mistral's window is 4096, with null there is none.
    settings = {**_DEFAULTS[kind], **_longest(settings), **settings}
    dim, heads = (
        count(settings, 'hidden_size', 'config.json'),
        count(settings, 'num_attention_heads', 'config.json'),
    )
    if settings.get('head_dim') is None and dim % heads:
        raise UserError(
            f'config.json: hidden_size {dim} is no multiple of num_attention_heads {heads}, and '
            'head_dim is missing'
        )
    theta, scaling, context = rope.from_huggingface(settings)
    tied = settings.get('tie_word_embeddings')
    if not isinstance(tied, bool | None):
        raise UserError(
            f'config.json: tie_word_embeddings = {short(tied)} is neither true nor false'
        )
    return ModelConfig(
        vocab=count(settings, 'vocab_size', 'config.json'),
        dim=dim,
        layers=count(settings, 'num_hidden_layers', 'config.json'),
        heads=heads,
        kv_heads=count(settings, 'num_key_value_heads', 'config.json', heads),
        head_dim=count(settings, 'head_dim', 'config.json', dim // heads),
        ffn=count(settings, 'intermediate_size', 'config.json'),
        context=context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number(settings, 'rms_norm_eps', 'config.json'),
        tied=bool(tied),
        pattern=_pattern(settings, kind, context),
    )


def _kind(settings: Mapping[str, Any]) -> str:
    """'llama' or 'mistral'."""
    names = settings.get('architectures')
    listed = set(map(str, names)) if isinstance(names, list) else set()
    if names is not None and not _ARCHITECTURES & listed:
        raise UserError(
            f'config.json: architectures = {short(names)} is not supported, only '
            'LlamaForCausalLM and MistralForCausalLM'
        )
    kind = settings.get('model_type')
    if kind is None:
        if names is None:
            raise UserError('config.json: model_type is missing: take the config.json of a model')
        return 'mistral' if 'MistralForCausalLM' in listed else 'llama'
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(
            f'config.json: model_type = {short(kind)} is not supported, only llama, mistral'
        )
    return kind


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raise UserError for what the decoder does not have. Warn, in one line, of unknown keys."""
    for name in ('quantization_config', 'quantization', 'compression_config', 'quant_config'):
        if method := _method(settings.get(name)):
            raise UserError(f'config.json: {name} says {method}: {UNQUANTISED}')
    unknown = []
    for name, value in settings.items():
        if name in _READ or value is None:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                only = ' or '.join(map(repr, _NEUTRAL[name]))
                raise UserError(
                    f'config.json: {name} = {short(value)} is not supported'
                    + (f', only {only}' if only else '')
                )
        elif not _WITHOUT_EFFECT.fullmatch(name):
            unknown.append(name)
    if unknown:
        log.warning('config.json: %s not known, and ignored', ', '.join(sorted(unknown)))


def _method(quantisation: Any) -> str | None:
    """How the weights are quantised, None where they are not."""
    if not quantisation:
        return None
    if not isinstance(quantisation, dict):
        return short(quantisation)
    loads = [quantisation.get(f'load_in_{n}bit') for n in (4, 8)]
    if False in loads and not any(loads):
        return None  # bitsandbytes, off
    method = quantisation.get('quant_method') or 'quantised weights'
    return f'{method}' + (f' of {bits} bits' if (bits := quantisation.get('bits')) else '')


def _longest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first conversions of LLaMA 1 call it by another name."""
    longest = settings.get('max_sequence_length')
    return {} if longest is None else {'max_position_embeddings': longest}


def _pattern(settings: Mapping[str, Any], kind: str, context: int) -> Pattern:
    """The window of Mistral 7B v0.1. One that is never left is none."""
    window = None
    if settings.get('sliding_window') is not None:
        window = count(settings, 'sliding_window', 'config.json')
    pattern: Pattern = Window(window) if window is not None and window < context else Dense()
    if kind == 'mistral' and window is not None and pattern == Dense():
        log.info(
            'config.json: sliding_window = %d is left out, for no text is longer than the context '
            'of %d: at a longer one (--model.context) there is none',
            *(window, context),
        )
    if pattern != Dense() and (kind == 'llama' or settings.get('use_sliding_window') is False):
        if kind == 'mistral':
            raise UserError(
                f'config.json: sliding_window = {window} and use_sliding_window = False say '
                'different things: remove one'
            )
        if settings.get('use_sliding_window') is not False:
            raise UserError(
                f'config.json: sliding_window = {window} is not supported with model_type llama, '
                'where transformers ignores it: remove it, or say model_type mistral'
            )
        pattern = Dense()
    types = settings.get('layer_types')
    if types is not None:
        wanted = {'full_attention'} if pattern == Dense() else {'sliding_attention'}
        found = set(map(str, types)) if isinstance(types, list) else {short(types)}
        if not found <= wanted:
            raise UserError(
                f'config.json: layer_types with {", ".join(sorted(found))} is not supported, only '
                f'{wanted.pop()} here'
            )
    return pattern


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """config.json of `config`, for transformers 4 and 5. Dropout is training's, and left out."""
    tensors_lib.check_llama(config)
    kind, name = 'llama', 'LlamaForCausalLM'
    own: dict[str, Any] = {'attention_bias': False, 'mlp_bias': False}
    if isinstance(config.pattern, Window):
        kind, name = 'mistral', 'MistralForCausalLM'
        own = {'sliding_window': config.pattern.size}
    return {
        'architectures': [name],
        'model_type': kind,
        'hidden_act': 'silu',
        'vocab_size': config.vocab,
        'hidden_size': config.dim,
        'intermediate_size': config.ffn,
        'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_dim,
        'rms_norm_eps': config.norm_eps,
        'tie_word_embeddings': config.tied,
        **rope.to_huggingface(config),
        **own,
    }
