"""Makes merges as `mergekit-pytorch` does, in mergekit's own interpreter, one after another.

Run as a script. Loading mergekit takes seconds and a merge of a small model hundredths of one, so
one process makes many. Each line of the input holds the arguments of one command, as JSON; a line
is written when it is done. Whatever goes wrong ends the process, with its traceback on stderr.
"""

import json
import sys
from contextlib import redirect_stdout

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would hide others of the same names
    from mergekit.scripts.merge_raw_pytorch import main

    for line in sys.stdin:
        with redirect_stdout(sys.stderr):
            main.main(args=json.loads(line), standalone_mode=False)
        sys.stdout.write("done\n")
        sys.stdout.flush()
