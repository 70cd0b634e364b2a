"""TiDAR decoding as a generation strategy of transformers: `model.generate(.., custom_generate=tidar_generation)`.

The `GenerationConfig` and all arguments are those of `generate`; what cannot be honoured is refused by name. Tokens are
those of autoregressive decoding: greedily those of `generate` itself, sampled ones with its distribution.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Iterator, Sequence
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
    stops = kwargs.pop("stop_strings", None)
    stops = config.stop_strings if stops is None else stops
    if stops is not None:
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

    Padding on either side is stripped by the attention mask. Stopping criteria are asked after every token, about the
    whole batch, and a streamer gets every token by itself. Sampling takes its seed from PyTorch's generator.

    Args:
        block_size, mask_token_id: default those in the config's entry `tidar`.
        mode, sampling: see `Decoder`.

    Returns:
        int64 `[batch, prompt + new tokens]`: prompts as they came, rows filled up with the padding token (else the
        end token, else 0); with `return_dict_in_generate` as `sequences`.

    Raises:
        TypeError, ValueError: the model or the options do not suit; beams, assistants and other modes of generation;
            processors that are not row-wise; scores, attentions or hidden states as output; a cache that is already
            filled; a mask with holes; positions that do not count from 0; a streamer for several prompts; inputs but
            tokens, also those that a wrapper of the model adds (PEFT's prompt learning).
    """
    if synced_gpus:
        raise ValueError("synced_gpus: expected False, got True")
    streamer = _streamer_of_caller() if streamer is None else streamer
    if block_size is not None:
        check_int("block_size", block_size, 1)
    _check_config(generation_config)
    _check_inputs(input_ids, streamer, model_kwargs)
    _check_preparation(model)
    adapter = decoder_model(model, None, block_size, mask_token_id, needs_mask=mode == "tidar")
    prompts, prefixes = _prompts(
        input_ids.to(model.device), model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    )
    rows = _Rows(input_ids, stopping_criteria, generation_config)
    # A token that no row can choose ends none; -1 is a usual way to say so.
    stop_tokens = [token for token in rows.end_tokens if 0 <= token < adapter.config.vocab_size]
    new_tokens = rows.limit - input_ids.shape[1]

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
    shared, seed = SamplingParams(**{"temperature": 1.0, **(options or {})}), 0
    if generation_config.do_sample:
        seed = int(torch.randint(2**63 - len(prompts), (), device="cpu"))
    else:  # whatever temperature a processor of the caller's own has
        shared = replace(shared, temperature=0.0)
    requests = {}
    for row, prompt in enumerate(prompts):
        request = decoder.add(prompt, new_tokens, replace(shared, seed=seed + row), stop_tokens=stop_tokens)
        requests[request] = (row, decoder.session.requests[request])

    while not rows.are_done and decoder.session.requests:
        for event in decoder.step():
            row, record = requests[event.id]
            rows.take(row, event.tokens, record.error if event.finish_reason == "error" else None)
        for column in rows.columns():
            if streamer is not None:
                streamer.put(torch.tensor(column, device="cpu"))
        for request, (row, _) in requests.items():
            if row not in rows.open and request in decoder.session.requests:
                decoder.remove(request)
    if streamer is not None:
        streamer.end()
    sequences: Any = rows.sequences
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


class _Rows:
    """The rows of a batch, a token of each at a time, as `generate` extends them, however far each is decoded.

    Stopping criteria see the whole batch after every token, rows that have ended filled up: they may count calls, keep
    something for each row, or end all rows at once. As in `generate`, a row that they end is filled up only where end
    tokens are among the criteria; else it goes on until all rows have ended.

    Args:
        input_ids: int64 `[batch, prompt]`.
        criteria: all of them, end tokens and the greatest length included.
        config: for the padding token (else the first end token, else 0), and the length if no criterion has it.

    Attributes:
        end_tokens: those that end a row.
        limit: tokens of a row, prompt included.
        open: the rows that take tokens.
        are_done: all rows have ended.
    """

    def __init__(self, input_ids: Tensor, criteria: Sequence[Any], config: GenerationConfig) -> None:
        self._input_ids = input_ids
        self.end_tokens = [t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()]
        self.limit = min([c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length])
        self._fills_up = any(hasattr(each, "eos_token_id") for each in criteria)
        self._others = StoppingCriteriaList(c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria))
        self._pad = config.pad_token_id if config.pad_token_id is not None else (self.end_tokens or [0])[0]
        self._ahead: list[deque[int]] = [deque() for _ in input_ids]  # decoded, and in no column yet
        self._errors: dict[int, str] = {}
        self._columns: list[list[int]] = []
        self._ended = [False] * len(input_ids)
        self.open, self.are_done = set(range(len(input_ids))), False

    @property
    def sequences(self) -> Tensor:
        """int64 `[batch, prompt + columns]`."""
        columns = torch.tensor(self._columns, dtype=torch.int64, device=self._input_ids.device)
        return torch.cat([self._input_ids, columns.reshape(-1, len(self._input_ids)).T], dim=1)

    def take(self, row: int, tokens: Sequence[int], error: str | None) -> None:
        """Tokens that were decoded for a row; `error` if its next one could not be, which matters if it is needed."""
        self._ahead[row].extend(tokens)
        if error is not None:
            self._errors[row] = error

    def columns(self) -> Iterator[list[int]]:
        """Every further token that all open rows have, `[batch]` at a time; criteria are asked about each.

        Raises:
            ValueError: the next one of an open row could not be decoded.
        """
        while not self.are_done:
            waiting = [row for row in sorted(self.open) if not self._ahead[row]]
            for row in waiting:
                if row in self._errors:
                    raise ValueError(f"logits: {self._errors[row]} in row {row}")
            if waiting:
                return
            column = [queue.popleft() if row in self.open else self._pad for row, queue in enumerate(self._ahead)]
            self._columns.append(column)
            self._ended = [ended or token in self.end_tokens for ended, token in zip(self._ended, column, strict=True)]
            if self._others:
                asked = self._others(self.sequences, None).tolist()
                self._ended = [ended or other for ended, other in zip(self._ended, asked, strict=True)]
            self.are_done = all(self._ended) or self._input_ids.shape[1] + len(self._columns) >= self.limit
            if self._fills_up:
                self.open = {row for row in self.open if not self._ended[row]}
            yield column


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
        if name not in _UNUSED and value is not None and value != {}:  # a model of images and text, given no image
            raise ValueError(f"{name}: expected tokens as the only input, got {type(value).__name__}")


def _check_preparation(model: Any) -> None:
    """Raise if `generate` would run the model on more than the tokens it is given, such as PEFT's virtual tokens."""
    own = vars(model).get("prepare_inputs_for_generation")
    if own is not None and getattr(own, "__func__", own) is not type(model).prepare_inputs_for_generation:
        whose = type(getattr(own, "__self__", own)).__name__
        raise ValueError(
            f"model: expected inputs that {type(model).__name__} prepares itself, got those that {whose} prepares"
        )
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "keywords", {}).get("alora_offsets") is not None:
                raise ValueError("model: expected PEFT adapters for all tokens, got one from an invocation on (aLoRA)")


def _prompts(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[list[list[int]], list[Tensor]]:
    """Every row's tokens without its padding, and the padding that stood before them.

    Args:
        input_ids: int64 `[batch, prompt]`.
        mask: of padding, `[batch, prompt]`.
        positions: `[1 or batch, prompt]`, or several of them for each row, `[any, 1 or batch, prompt]`.
    """
    if len(input_ids) == 0:
        raise ValueError("input_ids: expected at least one prompt, got none")
    for name, given in (("attention_mask", mask), ("position_ids", positions)):
        if given is not None and (given.shape[-1] != input_ids.shape[1] or given.shape[-2] not in (1, len(input_ids))):
            expected = f"[{len(input_ids)}, {input_ids.shape[1]}] as the tokens have"
            raise ValueError(f"{name}: expected shape {expected}, got {list(given.shape)}")
    prompts, prefixes = [], []
    for row, tokens in enumerate(input_ids):
        first, last = 0, len(tokens)
        if mask is not None:
            kept = mask.expand(len(input_ids), -1)[row].nonzero()[:, 0].tolist()
            if not kept or kept[-1] - kept[0] + 1 != len(kept):
                found = f"{len(kept)} in row {row}"
                raise ValueError(f"attention_mask: expected one run of tokens in each row, got {found}")
            first, last = kept[0], kept[-1] + 1
        if positions is not None:
            own = positions[..., row % positions.shape[-2], first:last]
            if bool((own != torch.arange(last - first, device=own.device)).any()):
                raise ValueError(f"position_ids: expected 0, 1, .. for the tokens of each row, got others in row {row}")
        prompts.append(tokens[first:last].tolist())
        prefixes.append(tokens[:first])
    return prompts, prefixes
