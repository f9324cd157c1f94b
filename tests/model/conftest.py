"""These tests run on one thread, so that sums are added in one order."""

from tests.support.models import one_thread  # noqa: F401 (a fixture that every test here uses)
