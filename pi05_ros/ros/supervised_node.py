"""A lifecycle node that survives what kills or silences a plain rclpy one.

In rclpy 7.1.6 a transition that is not allowed in the present state raises through the executor, and an exception
inside a transition callback vanishes without a word. Here the first is answered with success=False and a log line,
the second is logged with its traceback.
"""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Callable

from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from pi05_ros.errors import Pi05Error


class SupervisedNode(LifecycleNode):
    """Subclasses write `configure`, `activate`, `deactivate` and `teardown`; an exception in one ends its transition.

    A Pi05Error in `configure` or `activate` is FAILURE: the node stays where it was. Anything else is ERROR: the node
    goes through `teardown` to unconfigured, from where it can be configured again.
    """

    def __init__(self, name: str, **kwargs) -> None:
        super().__init__(name, **kwargs)
        change_state = self._service_change_state
        original = change_state.callback

        def answer(request, response):
            try:
                return original(request, response)
            except Exception as error:  # rclpy raises RCLError: the transition does not start here
                self.get_logger().error(
                    f"change_state: expected a transition allowed in state '{self.state_label}', received "
                    f"'{request.transition.label or request.transition.id}'. Ask get_available_transitions. ({error})")
                response.success = False
                return response

        change_state.callback = answer

    def destroy_node(self) -> None:
        """Also let go of the state machine, which in rclpy 7.1.6 keeps the DDS participant alive until a garbage
        collection."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    @abstractmethod
    def configure(self) -> None: ...

    @abstractmethod
    def activate(self) -> None: ...

    @abstractmethod
    def deactivate(self) -> None:
        """Stop publishing; the robot must come to rest."""

    @abstractmethod
    def teardown(self) -> None:
        """Free everything `configure` made; called for cleanup, shutdown and error, also after half a configure."""

    @property
    def state_label(self) -> str:
        return self._state_machine.current_state[1]

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("configure", self.configure, undo=self.teardown)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("activate", self.activate, undo=self.deactivate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("deactivate", self.deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("cleanup", self.teardown)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._attempt("shutdown", self._stop_all)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.get_logger().error(f"error while in '{state.label}': cleaning up; configure to try again")
        return self._attempt("error recovery", self._stop_all)

    def _stop_all(self) -> None:
        try:
            self.deactivate()
        finally:
            self.teardown()

    def _attempt(self, name: str, action: Callable[[], None],
                 undo: Callable[[], None] | None = None) -> TransitionCallbackReturn:
        try:
            action()
            return TransitionCallbackReturn.SUCCESS
        except Pi05Error as error:
            self.get_logger().error(f"{name} failed: {error}")
            answer = TransitionCallbackReturn.FAILURE
        except Exception:  # logged here because rclpy would swallow it; the node goes to error processing
            self.get_logger().error(f"{name} failed unexpectedly:\n{traceback.format_exc()}")
            answer = TransitionCallbackReturn.ERROR
        if undo is None:
            return TransitionCallbackReturn.ERROR
        try:
            undo()
        except Exception:  # whatever it is, the node must reach error processing, which cleans up again
            self.get_logger().error(f"undoing {name} failed:\n{traceback.format_exc()}")
            return TransitionCallbackReturn.ERROR
        return answer
