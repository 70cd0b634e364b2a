"""Lets vLLM's V2 model runner run on a CPU, its Triton kernels interpreted. For tests: put this folder on PYTHONPATH.

On a CPU vLLM wants Triton's "cpu" backend, which stock Triton lacks. The interpreter asks a backend for nothing, so an
entry of that name is all it takes. One kernel does not run in the interpreter, top-k and top-p: vLLM has the same in
PyTorch, for a machine without Triton. Python imports this module when it starts, in every process of an engine.
"""

import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

backends.setdefault("cpu", SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True)))

# A launch makes the language the interpreter's and takes that back, and copies its tensors to the CPU and back. Here
# there is nothing else to take it back for and nowhere to copy to: small launches take two thirds of the time.
interpreter = importlib.import_module("triton.runtime.interpreter")
_patch_language, _patched = interpreter._patch_lang, set()


def _patch_once(function):
    tl = interpreter.tl
    languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
    if languages not in _patched:
        _patched.add(languages)
        _patch_language(function)
    return SimpleNamespace(restore=lambda: None)


# Some masks come as int1 in a wider NumPy type, which the interpreter refuses.
def _masked_store(self, pointers, value, mask, *others):
    return _store(self, pointers, value, interpreter.TensorHandle(mask.data.astype(bool), mask.dtype), *others)


def _masked_load(self, pointers, mask, *others):
    return _load(self, pointers, interpreter.TensorHandle(mask.data.astype(bool), mask.dtype), *others)


_store, _load = (getattr(interpreter.InterpreterBuilder, f"create_masked_{name}") for name in ("store", "load"))
interpreter.InterpreterBuilder.create_masked_store = _masked_store
interpreter.InterpreterBuilder.create_masked_load = _masked_load
interpreter._patch_lang = _patch_once
interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


class _TopKTopPInPyTorch(MetaPathFinder):
    """Sets `HAS_TRITON = False` in the one module that filters logits, after it was imported."""

    name = "vllm.v1.sample.ops.topk_topp_sampler"

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.HAS_TRITON = False

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _TopKTopPInPyTorch())
