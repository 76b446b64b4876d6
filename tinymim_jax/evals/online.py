"""Evaluation beside the training: a batch of it after each step, the host's part in a thread."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Generator, Mapping

import jax
import jax.numpy as jnp

from tinymim_jax.evals.contract import Evaluator, Finish, Predict, together
from tinymim_jax.runtime import multihost
from tinymim_jax.tasks.contract import Frozen, Variables

POLL = 0.05  # seconds between looks at whether the host is done


class Online:
    """One evaluation at a time, of a copy of the weights: training goes on and donates its own.

    Devices get its batches from the training thread, between steps, in an order that is the same in every process.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator],
        predict: Predict,
        frozen: Frozen,
        write: Callable[[int, dict[str, float]], None],
    ):
        """`write` gets the step that an evaluation was started at, and its results."""
        self.evaluators, self.predict, self.frozen, self.write = evaluators, predict, frozen, write
        self.copy = jax.jit(lambda variables: jax.tree.map(jnp.copy, variables))
        self.step, self.variables = 0, None
        self.running: Generator[None, None, Finish] | None = None
        self.finishing: concurrent.futures.Future | None = None

    def start(self, step: int, variables: Variables) -> None:
        """Begins to evaluate the weights after `step`; first waits for the evaluation before."""
        self.wait()
        self.step, self.variables = step, self.copy(variables)
        self.running = together(self.evaluators, self.predict, self.variables, self.frozen)

    def state(self) -> tuple[int, Variables] | None:
        """Step and weights that are being evaluated, if any: with them the evaluation can be made again."""
        return None if self.variables is None else (self.step, self.variables)

    def advance(self) -> None:
        """One batch further, or, when all are done, a look whether the host is; raises what the evaluator raised."""
        if self.running is not None:
            try:
                next(self.running)
            except StopIteration as end:
                self.running, self.finishing = None, in_thread(end.value)
        elif self.finishing is not None and self.finishing.done() and jax.process_count() == 1:
            self._write()  # several processes write, and raise, where all of them wait

    def wait(self, is_asked: Callable[[], bool] = lambda: False) -> bool:
        """Returns when the results of what was started are written; or, with False, once `is_asked`, alike in all."""
        while self.running is not None or self._is_finishing():
            if is_asked():
                return False
            if self.running is not None:
                self.advance()
            else:
                time.sleep(POLL)
        if self.finishing is not None:
            self._write()
        return True

    def _is_finishing(self) -> bool:
        """Whether the host of any process is still busy."""
        return self.finishing is not None and multihost.agreed(not self.finishing.done())

    def _write(self) -> None:
        finishing, self.finishing = self.finishing, None
        self.write(self.step, finishing.result())
        self.variables = None

    def __enter__(self) -> "Online":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running is not None:
            self.running.close()


def in_thread(function: Finish) -> concurrent.futures.Future:
    """`function` under way in a thread that nothing waits for at the end."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
