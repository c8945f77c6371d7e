"""Runs a framework's own tests, with nbbn's classes in the place of the framework's."""

import sys
import unittest


def run(tests: unittest.TestSuite, is_unable) -> None:
    """End the process with 0 if no test failed but those that is_unable(test, error) knows; error: of sys.exc_info().

    Prints the numbers of tests that passed, and of those that cannot.
    """

    class Result(unittest.TextTestResult):
        passed = unable = 0

        def addSuccess(self, test):
            super().addSuccess(test)
            self.passed += 1

        def addError(self, test, error):
            if not self._is_unable(test, error):
                super().addError(test, error)

        def addFailure(self, test, error):
            if not self._is_unable(test, error):
                super().addFailure(test, error)

        def _is_unable(self, test, error):
            found = is_unable(test, error)
            self.unable += found
            return found

    result = unittest.TextTestRunner(resultclass=Result).run(tests)
    print(f"\npassed {result.passed}, unable {result.unable}, failed {len(result.failures) + len(result.errors)}")
    sys.exit(not result.wasSuccessful())
