"""What holds for all tests."""

from hypothesis import settings

# No test is about time: on a busy machine any example may be slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
