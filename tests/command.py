"""Calls the main() of a script in this process, as a command would."""
import contextlib
import io
import re


def run_main(main, *arguments):
    """Exit code, stdout and stderr of `main(arguments)`."""
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leave:
            code = leave.code
    return code, output.getvalue(), errors.getvalue()


def refused(main, code, *arguments):
    """The one line on stderr with which `main` must leave by `code`, having printed nothing else."""
    got, output, errors = run_main(main, *arguments)
    assert (got, output) == (code, ""), (got, output, errors)
    assert re.fullmatch(r"error: [^\n]+\. [^\n]+\n", errors), errors
    return errors
