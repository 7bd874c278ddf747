# The command line of every script: python SCRIPT [CONFIG.py ...] [--key=value ...]
#
#     exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
#
# below a script's settings (its public module-level names that hold an int, float, bool or str) executes
# the config files among them, sets the keys, left to right, and leaves `config_keys`, a list of their
# names. Exec'd, not imported: so `learning_rate` is a plain variable everywhere. What it can't take it
# refuses in one line, exit code 2. A setting whose default is 'auto' also takes True and False.

def _configure(settings):
    """ Applies sys.argv to `settings`, the globals of the script, and returns the settings' names. """
    import ast
    import builtins  # the scripts have a setting named compile
    import os
    import sys
    import time
    from difflib import get_close_matches

    def refuse(message):
        time.sleep(15 if os.environ.get('LOCAL_RANK', '0') != '0' else 0)  # torchrun ends all but the first
        print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
        sys.exit(2)

    def literal(text):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def settings_of(names):
        return {key: value for key, value in names.items()
                if not key.startswith('_') and type(value) in (int, float, bool, str)}

    defaults = settings_of(settings)
    first_process = os.environ.get('RANK', '0') == '0'

    def put(key, value, source):
        kind = type(defaults[key])
        if getattr(value, 'shape', None) == ():
            value = value.item()  # a numpy number; checkpoints keep plain ones
        if (kind, type(value)) == (float, int) or kind is int and type(value) is float and value.is_integer():
            value = kind(value)  # 1 for a float, 6e5 for an int
        if defaults[key] == 'auto' and value in ('True', 'False'):
            value = value == 'True'
        if type(value) is not kind and not (defaults[key] == 'auto' and type(value) is bool):
            words = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string'}
            refuse(f'{source}: {key} takes {words[kind]}, not {value!r}')
        settings[key] = value

    def run_file(path):
        if not os.path.isfile(path) or not path.endswith('.py'):
            refuse(f'no config file {path!r} (one ends in .py); settings are given as --key=value')
        names = dict(settings)
        try:
            with open(path, encoding='utf-8') as f:
                exec(builtins.compile(f.read(), path, 'exec'), names)
        except Exception as error:
            trace = error.__traceback__.tb_next
            line = error.lineno if isinstance(error, SyntaxError) else trace.tb_lineno if trace else 0
            refuse(f'{path}, line {line}: {type(error).__name__}: {getattr(error, "msg", error)}')
        for key in (unknown := [key for key in settings_of(names) if key not in settings]):
            if near := get_close_matches(key, [k for k in defaults if names[k] is settings[k]], 1, 0.8):
                refuse(f'{path}: no setting {key!r}; did you mean {near[0]!r}?')
        if unknown and first_process:
            print(f'{path}: ignored, not settings of this script: {", ".join(unknown)}')
        for key in defaults:
            if names[key] is not settings[key]:
                put(key, names[key], path)

    def print_help():
        """ The docstring, and the source from the first setting down to the line that exec's us. """
        with open(settings['__file__'], encoding='utf-8') as f:
            lines = f.read().split('configurator.py')[0].split('if __name__')[0].split('\n')[:-1]
        first = next((i for i, line in enumerate(lines) if line.split(' = ')[0] in defaults), len(lines))
        while first and lines[first - 1].startswith('#'):
            first -= 1
        print((settings['__doc__'] or '').strip(), *lines[first:], sep='\n')
        sys.exit(0)

    for arg in sys.argv[1:]:
        key, equals, text = arg.removeprefix('--').partition('=')
        if arg in ('--help', '-h'):
            print_help()
        elif not arg.startswith('--') and not equals:
            run_file(arg)
        elif not arg.startswith('--') or not equals:
            refuse(f'cannot read {arg!r}; a setting is given as --key=value')
        elif key not in defaults:
            near = get_close_matches(key, defaults, 1, 0)
            refuse(f'no setting {key!r}' + (f'; the nearest is {near[0]!r}' if near else ''))
        else:
            put(key, text if type(defaults[key]) is str else literal(text), arg)

    changed = [f'{key} = {settings[key]!r}' for key in defaults if settings[key] != defaults[key]]
    if changed and first_process:
        print('overriding: ' + ', '.join(changed))
    return list(defaults)


config_keys = _configure(globals())
