"""TiDAR decoding as a generation strategy of transformers: `model.generate(.., custom_generate=tidar_generation)`.

The `GenerationConfig` and all arguments are those of `generate`; what cannot be honoured is refused by name. Tokens are
those of autoregressive decoding: greedily those of `generate` itself, sampled ones with its distribution.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...decoding.decoder import Mode, ModelDecoder
from ...ops.verify import Rule, SamplingParams
from ...patterns.arguments import check_int
from .model import TransformersModel, decoder_model
from .processors import ProcessedModel, check_row_wise, sampling_options

__all__ = ["generate", "tidar_generation"]

# What `generate` prepares for its own loops, and this one does not need.
_UNUSED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(inputs, ..)` by TiDAR decoding, stop strings included.

    transformers hands a callable strategy no tokenizer, so `stop_strings` need this function, or the folder of this
    package as `custom_generate`, which comes here.

    Args:
        model: see `TransformersModel`.
        inputs, generation_config, stopping_criteria: as for `generate`.
        tokenizer: for `stop_strings`.
        kwargs: other arguments of `generate`, and options of `tidar_generation`.

    Raises:
        TypeError, ValueError: as `tidar_generation`, and stop strings without a tokenizer.
    """
    config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    stops = kwargs.pop("stop_strings", None) or config.stop_strings
    if stops:
        if tokenizer is None:
            raise ValueError("tokenizer: expected one beside stop_strings, got None")
        config.stop_strings = None
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stops))
    _check_streamer(kwargs.get("streamer"))  # transformers writes the prompt to it first
    return model.generate(
        inputs, generation_config=config, stopping_criteria=criteria, custom_generate=tidar_generation, **kwargs
    )


def tidar_generation(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    mode: Mode = "tidar",
    sampling: Rule = "coupled",
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The strategy itself; `generate` calls it, and takes its keyword options along.

    Padding on either side is stripped by the attention mask. Stopping criteria are asked after every token, a row at a
    time, and a streamer gets every token by itself. Sampling takes its seed from PyTorch's generator.

    Args:
        block_size, mask_token_id: default those in the config's entry `tidar`.
        mode, sampling: see `Decoder`.

    Returns:
        int64 `[batch, prompt + new tokens]`: prompts as they came, rows filled up with the padding token (else the
        end token, else 0); with `return_dict_in_generate` as `sequences`.

    Raises:
        TypeError, ValueError: the model or the options do not suit; beams, assistants and other modes of generation;
            processors that are not row-wise; scores, attentions or hidden states as output; a cache that is already
            filled; a mask with holes; a streamer for several prompts; inputs but tokens.
    """
    if synced_gpus:
        raise ValueError("synced_gpus: expected False, got True")
    streamer = _streamer_of_caller() if streamer is None else streamer
    if block_size is not None:
        check_int("block_size", block_size, 1)
    _check_config(generation_config)
    _check_inputs(input_ids, streamer, model_kwargs)
    adapter = decoder_model(model, None, block_size, mask_token_id, needs_mask=mode == "tidar")
    prompts, prefixes = _prompts(input_ids.to(model.device), model_kwargs.get("attention_mask"))
    stop_tokens = [t for c in stopping_criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()]
    criteria = StoppingCriteriaList(
        c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
    )
    limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    new_tokens = min(limits or [generation_config.max_length]) - input_ids.shape[1]

    options = sampling_options(logits_processor, any(map(len, prefixes)))
    max_len = max(map(len, prompts)) + new_tokens + (block_size or adapter.config.block_size or 1)
    wrapped: TransformersModel | ProcessedModel = adapter
    if options is None:
        check_row_wise(logits_processor)
        wrapped = ProcessedModel(adapter, logits_processor, prefixes, max_len)
    decoder = ModelDecoder(
        wrapped,
        block_size,
        mask_token_id,
        mode=mode,
        sampling=sampling,
        batch_size=len(prompts),
        max_len=max_len,
        cuda_graph=False if options is None else None,
    )
    sampled, seed = bool(generation_config.do_sample), 0
    if sampled:
        seed = int(torch.randint(2**63 - len(prompts), (), device="cpu"))
    requests = {}
    for row, prompt in enumerate(prompts):
        params = replace(SamplingParams(temperature=float(sampled), seed=seed + row), **(options or {}))
        request = decoder.add(prompt, new_tokens, params, stop_tokens=stop_tokens)
        requests[request] = (row, decoder.session.requests[request])

    given = input_ids.tolist()
    tokens: list[list[int]] = [[] for _ in prompts]
    while decoder.session.requests:
        for event in decoder.step():
            row, record = requests[event.id]
            if event.finish_reason == "error":
                raise ValueError(f"logits: {record.error} in row {row}")
            for token in event.tokens:
                tokens[row].append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token], device="cpu"))
                if criteria and _is_done(criteria, given[row] + tokens[row], input_ids.device):
                    if event.finish_reason is None:
                        decoder.remove(event.id)
                    break
    if streamer is not None:
        streamer.end()

    pad = generation_config.pad_token_id
    pad = (stop_tokens or [0])[0] if pad is None else pad
    longest = max(map(len, tokens))
    filled = torch.tensor([row + [pad] * (longest - len(row)) for row in tokens], device=input_ids.device)
    sequences: Any = torch.cat([input_ids, filled], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


def _streamer_of_caller() -> Any:
    """The streamer that `generate` was called with: transformers hands it to its own strategies only, not to callables.

    It has put the prompt there already, and whoever reads the stream waits for its end.
    """
    caller = sys._getframe(2)
    return caller.f_locals.get("streamer") if caller.f_code.co_name == "generate" else None


def _check_config(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation_config: expected greedy search or sampling, got {mode.value}")
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                raise ValueError(f"{name}: expected False, got True")


def _check_streamer(streamer: Any) -> None:
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"streamer: expected one of transformers, with put and end, got {type(streamer).__name__}")


def _check_inputs(input_ids: Tensor, streamer: Any, model_kwargs: dict[str, Any]) -> None:
    _check_streamer(streamer)
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"streamer: expected a single prompt beside it, got {len(input_ids)}")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(f"past_key_values: expected none, or an empty cache, got a filled {type(cache).__name__}")
    for name, value in model_kwargs.items():
        if name not in _UNUSED and value is not None:
            raise ValueError(f"{name}: expected tokens as the only input, got {type(value).__name__}")


def _prompts(input_ids: Tensor, mask: Tensor | None) -> tuple[list[list[int]], list[Tensor]]:
    """Every row's tokens without its padding, and the padding that stood before them."""
    prompts, prefixes = [], []
    for row, tokens in enumerate(input_ids):
        first, last = 0, len(tokens)
        if mask is not None:
            kept = mask[row].nonzero()[:, 0].tolist()
            if not kept or kept[-1] - kept[0] + 1 != len(kept):
                found = f"{len(kept)} in row {row}"
                raise ValueError(f"attention_mask: expected one run of tokens in each row, got {found}")
            first, last = kept[0], kept[-1] + 1
        prompts.append(tokens[first:last].tolist())
        prefixes.append(tokens[:first])
    return prompts, prefixes


def _is_done(criteria: StoppingCriteriaList, tokens: list[int], device: torch.device) -> bool:
    return bool(criteria(torch.tensor([tokens], device=device), None).any())
