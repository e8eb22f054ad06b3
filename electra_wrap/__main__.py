"""`python -m electra_wrap`. A signal gives one line, also while modules are being imported."""

import signal
import sys


def main() -> None:
    """Run the command line."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    try:
        from electra_wrap.cli import entry_point

        entry_point()
    except KeyboardInterrupt:
        print("electra_wrap: error: interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
