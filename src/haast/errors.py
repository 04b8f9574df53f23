"""What can go wrong at Haast's boundary. All are `ValueError`s that name the value and the remedy.

ValueError
├── UnsupportedModelError   the target cannot be drafted for (encoder-decoder, recurrent state, no LM head)
├── HeadMismatchError       the head does not fit the target, or its files are incomplete or corrupt
└── PromptError             a prompt is empty or longer than the target's context
"""


class UnsupportedModelError(ValueError):
    """The target model cannot be drafted for; the message names its class and why."""


class HeadMismatchError(ValueError):
    """A head's files are corrupt or incomplete, or belong to another target."""


class PromptError(ValueError):
    """A prompt cannot be answered: it is empty, or longer than the context."""
