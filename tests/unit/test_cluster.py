"""What a user is told of an error that came back through Ray."""

from __future__ import annotations

from actors.cluster import FaultError, explain
from unmask.errors import ConfigError, UserError


class TaskError(RuntimeError):
    """Stands where Ray's own wrapper does: it keeps the error of the actor as `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("wrapped")
        self.cause = cause


def test_users_mistake_is_found_under_its_wrappers() -> None:
    mistake = ConfigError("too long", field="target.max_model_len")
    outer = RuntimeError("job failed")
    outer.__cause__ = TaskError(mistake)
    assert explain(outer) is mistake


def test_users_mistake_is_found_in_a_printed_traceback() -> None:
    printed = "The actor died:\n  File x\nunmask.errors.ConfigError: target.engine: vLLM refuses it\n"
    told = explain(RuntimeError(printed))
    assert isinstance(told, UserError)
    assert str(told) == "target.engine: vLLM refuses it"


def test_anything_else_is_a_fault_with_its_last_line() -> None:
    told = explain(RuntimeError("Traceback\n  much detail\nnode 3 is gone\n\n"))
    assert isinstance(told, FaultError)
    assert str(told) == "node 3 is gone"
    assert str(explain(RuntimeError())) == "RuntimeError"


def test_what_ray_data_wraps_around_a_fault_is_not_the_fault() -> None:
    from ray.data._internal.util import _annotate_exception_with_retry_context

    fault = "FileNotFoundError: '/shared/prompts/part-00000.parquet': No such file or directory"
    context = {"description": "apply UDF transform", "attempts": 1, "max_attempts": 1, "total_backoff_s": 0.0}
    wrapper = RuntimeError("UDF failed to process a data block.")
    advised = _annotate_exception_with_retry_context(wrapper, exception_str=str(wrapper), **context)
    assert "retried_map_errors" in str(advised)
    chained = "The above exception was the direct cause of the following exception:"
    assert str(explain(RuntimeError(f"Traceback\n{fault}\n\n{chained}\n\nray::Map()\n{advised}"))) == fault
    assert str(explain(advised)) == "UDF failed to process a data block."
