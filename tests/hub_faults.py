"""Ask a hub for a teacher, once for each name given, and print as JSON what came of it.

HF_ENDPOINT=http://127.0.0.1:PORT python tests/hub_faults.py NAME...
"""

import json
import sys
import warnings

import willows_kd as kd

found = {}
for name in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            kd.load_teacher(name, "cpu")
            what, message = "loaded", ""
        except kd.InputError as error:
            what, message = type(error).__name__, str(error)
    found[name] = {
        "what": what,
        "message": message,
        "warnings": [str(one.message) for one in said],
    }
print(json.dumps(found))
