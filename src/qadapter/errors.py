"""Every error a user can cause, as one tree.

UserError
├── DataError       a preference file, a row, a prompt
├── ConfigError     a setting, or settings that contradict each other
├── ModelError      a base model, tokenizer or chat template
├── ArtefactError   a saved adapter directory
└── TrainingError   a run that must stop (NaN loss, nothing trainable, adapter unchanged)

The message is one sentence: where, what, how to mend. The command line prints it and exits with 2;
anything else that escapes is our bug.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend; the message says where, what and how."""


class DataError(UserError):
    """A preference file, row or prompt cannot be used as it stands."""


class ConfigError(UserError):
    """A setting is out of range, or two settings contradict each other."""


class ModelError(UserError):
    """A base model, tokenizer or chat template cannot be found or is not supported."""


class ArtefactError(UserError):
    """A saved adapter directory is incomplete, damaged, or belongs to another base."""


class TrainingError(UserError):
    """A training run that must not go on, or must not be called finished."""


@contextmanager
def needs(extra: str, asker: str) -> Iterator[None]:
    """Turn a failed import inside the block into a ConfigError that says what to install.

    Args:
        extra: that of our package which brings what is imported.
        asker: the command or flag that needs it.
    """
    try:
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        why = f"{missing} is not installed" if missing else str(error)
        raise ConfigError(f"{asker}: {why}; run `pip install 'qadapter[{extra}]'`.") from error
