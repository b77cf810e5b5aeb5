"""Ids of special tokens of Llama 3 and 4, as Meta's models have them, by their number of ranks."""

IDS = {
    128_000: {
        '<|begin_of_text|>': 128_000,
        '<|end_of_text|>': 128_001,
        '<|finetune_right_pad_id|>': 128_004,
        '<|start_header_id|>': 128_006,
        '<|end_header_id|>': 128_007,
        '<|eom_id|>': 128_008,
        '<|eot_id|>': 128_009,
        '<|python_tag|>': 128_010,
        '<|reserved_special_token_2|>': 128_012,
        '<|reserved_special_token_245|>': 128_255,
    },
    200_000: {
        '<|begin_of_text|>': 200_000,
        '<|end_of_text|>': 200_001,
        '<|header_start|>': 200_005,
        '<|header_end|>': 200_006,
        '<|eom|>': 200_007,
        '<|eot|>': 200_008,
        '<|finetune_right_pad|>': 200_018,
        '<|text_post_train_reserved_special_token_68|>': 200_079,
        '<|image_start|>': 200_080,
        '<|image|>': 200_090,
        '<|patch|>': 200_092,
        '<|vision_reserved_special_token_1047|>': 201_133,
        '<|reasoning_thinking_end|>': 201_143,
    },
}
SIZES = {128_000: 128_256, 200_000: 202_048}
