"""vLLM's own Llama, Mistral, Qwen2 and Qwen3, decoded several tokens a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform

from .plugin import BACKEND
from .settings import Settings

if TYPE_CHECKING:
    from .state import TidarModelState

__all__ = [
    "TidarLlamaForCausalLM",
    "TidarMistralForCausalLM",
    "TidarQwen2ForCausalLM",
    "TidarQwen3ForCausalLM",
]


class _Tidar(nn.Module):
    """Before one of vLLM's classes in the order of bases: its state in the runner, and a lm_head for chosen rows.

    Attributes:
        hold_logits: the next call of `compute_logits` returns the hidden states. The runner asks for logits of every
            row of a step; our sampler needs those of the draft rows and of one block of masks, and asks again.

    Raises:
        TypeError, ValueError: the configuration has no good entry `tidar`, or the engine runs in a way that a step
            does not fit into.
    """

    hold_logits = False

    # Which adapter a row of logits has is set by vLLM for one row a request; our sampler asks for others. So adapters
    # of the lm_head are refused (vLLM names the modules), those of every other layer work as in vLLM.
    embedding_modules: ClassVar = {"embed_tokens": "input_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def get_model_state_cls() -> type[TidarModelState]:
        from .state import TidarModelState

        return TidarModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        if self.hold_logits:
            self.hold_logits = False
            return hidden_states
        vllms: Any = super()
        logits: Tensor = vllms.compute_logits(hidden_states)
        return logits


def check_engine(config: Any) -> None:
    """Raise ValueError, naming the argument, for an engine that would not decode as said, or wrongly."""
    settings, parallel = Settings.of(getattr(config.model_config.hf_config, "tidar", None)), config.parallel_config
    if not config.use_v2_model_runner:
        raise ValueError("engine: expected vLLM's V2 model runner, got V1 (VLLM_USE_V2_MODEL_RUNNER=0, or no Triton)")
    if config.num_speculative_tokens != settings.rows - 1 or config.speculative_config is not None:
        raise ValueError(
            f"diffusion_config: expected canvas_length {settings.rows - 1} and no speculative_config for "
            f"{settings.drafting.label}, got {config.num_speculative_tokens} speculative tokens; see engine_options"
        )
    if not settings.causal:
        check_attention(config, settings)
    one = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for name, size in one.items():
        if size > 1:
            raise ValueError(f"{name}: expected 1 with several tokens a step, got {size}")
    off = {
        "enable_batch_sharded_sampling": parallel.enable_batch_sharded_sampling,
        "enable_dbo": parallel.enable_dbo,
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "enable_trace_replay": config.model_config.enable_trace_replay,
        "return_sampling_mask": config.model_config.return_sampling_mask,
    }
    for name, on in off.items():
        if on:
            raise ValueError(f"{name}: expected False with several tokens a step, got True")


def check_attention(config: Any, settings: Settings) -> None:
    """Raise ValueError unless rows will see what the strategy's pattern says: on CPUs, or on CUDA by our backend."""
    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise ValueError(
            f"strategy: expected isd on {current_platform.device_name}, for {settings.strategy} has an attention "
            f"backend on CUDA and CPUs alone, got {settings.strategy}"
        )
    name, path = BACKEND
    chosen = config.attention_config.backend
    if chosen is None or chosen.name != name or chosen.get_path() != path:
        got = "none" if chosen is None else f"{chosen.name}, {chosen.get_path()}"
        raise ValueError(f"attention_backend: expected {name}, {path}, for {settings.strategy}, got {got}")


class TidarLlamaForCausalLM(_Tidar, LlamaForCausalLM):
    """Llama."""


class TidarMistralForCausalLM(_Tidar, MistralForCausalLM):
    """Mistral."""


class TidarQwen2ForCausalLM(_Tidar, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class TidarQwen3ForCausalLM(_Tidar, Qwen3ForCausalLM):
    """Qwen3."""
