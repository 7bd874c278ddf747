# The command line of every script: python SCRIPT [CONFIG.py ...] [--key=value ...]
#
#     exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
#
# stands below a script's settings, which are its public module-level variables that hold an int,
# float, bool or str. It executes the config files among them and sets the keys, from left to
# right; the last one counts. It is executed and not imported, so that `learning_rate` is a plain
# variable everywhere. What it cannot read it refuses in one line, with exit code 2.
#
# It leaves `config_keys`, the names of the settings, and `config_overrides`, a line for each
# setting that is not at its default, for the script to print once the settings have been checked.

def _configure(settings):  # noqa: C901  it is small functions, which the script need not see
    """ Applies sys.argv to `settings`, the script's globals -> config_keys, config_overrides. """
    import ast
    import builtins  # the scripts have a setting named compile
    import glob
    import os
    import sys
    from difflib import get_close_matches

    is_master = os.environ.get('RANK', '0') == '0'

    def refuse(message):
        print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
        sys.exit(2)

    def settings_in(names):
        return {key: value for key, value in names.items()
                if not key.startswith('_') and type(value) in (int, float, bool, str)}

    defaults = settings_in(settings)

    def convert(key, value):
        """ Converts a value to the type of the setting's default, if that is lossless. """
        kind = type(defaults[key])
        if getattr(value, 'shape', None) == ():  # a NumPy number; checkpoints hold Python's
            value = value.item()
        if kind is float and type(value) is int:
            return float(value)  # 1 for 1.0
        if kind is int and type(value) is float and value.is_integer():
            return int(value)  # 6e5 for 600000
        if defaults[key] == 'auto' and value in ('True', 'False'):
            return value == 'True'
        return value

    def put(key, value, source):
        kind = type(defaults[key])
        value = convert(key, value)
        is_choice = defaults[key] == 'auto' and type(value) is bool
        if type(value) is not kind and not is_choice:
            descriptions = {bool: 'True or False', int: 'an integer', float: 'a number',
                            str: 'a string'}
            refuse(f'{source}: {key} requires {descriptions[kind]}, not {value!r}')
        settings[key] = value

    def read_value(key, text):
        """ The value of --key=text: a string setting takes the text as it is. """
        if type(defaults[key]) is str:
            return text
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def refuse_config_file(path):
        folder = os.path.dirname(settings['__file__'])
        existing = glob.glob(os.path.join(folder, 'config', '*.py'))
        names = [os.path.join('config', os.path.basename(name)) for name in existing]
        nearest = get_close_matches(path, names, 1, 0.5)
        hint = '; settings are given as --key=value'
        if nearest and os.path.isfile(nearest[0]):
            hint = f'; did you mean {nearest[0]}?'
        elif nearest:  # the script runs from another folder
            hint = f'; did you mean {os.path.join(folder, nearest[0])}?'
        problem = 'does not exist'
        if os.path.isfile(path):
            problem = 'does not end in .py'
        refuse(f'config file {path!r} {problem}{hint}')

    def execute(path):
        """ Executes a config file -> its variables, the script's settings among them. """
        names = dict(settings)
        try:
            with open(path, encoding='utf-8') as file:
                exec(builtins.compile(file.read(), path, 'exec'), names)
        except Exception as error:
            line = 0
            if isinstance(error, SyntaxError):
                line = error.lineno
            elif error.__traceback__.tb_next is not None:
                line = error.__traceback__.tb_next.tb_lineno
            reason = getattr(error, 'msg', error)
            refuse(f'{path}, line {line}: {type(error).__name__}: {reason}')
        return {**settings, **names}  # it may have deleted some

    def apply_config_file(path):
        if not os.path.isfile(path) or not path.endswith('.py'):
            refuse_config_file(path)
        names = execute(path)
        unknown = [key for key in settings_in(names) if key not in settings]
        unchanged = [key for key in defaults if names[key] is settings[key]]
        for key in unknown:
            # a helper variable is fine; one that looks like a setting that the file does not set
            # is a typo
            nearest = get_close_matches(key, unchanged, 1, 0.8)
            if nearest:
                refuse(f'{path}: unknown setting {key!r}; did you mean {nearest[0]!r}?')
        if unknown and is_master:
            print(f'{path}: ignored, not settings of this script: {", ".join(unknown)}')
        for key in defaults:
            if names[key] is not settings[key]:
                put(key, names[key], path)

    def print_help():
        """ Prints the docstring, and the settings down to a line of dashes or the configurator. """
        with open(settings['__file__'], encoding='utf-8') as file:
            lines = file.read().split('\n')
        print((settings['__doc__'] or '').strip())
        first = 0
        while first < len(lines) and lines[first].split(' = ')[0] not in defaults:
            first += 1
        while lines[first - 1].startswith('#') and not lines[first - 1].startswith('# ---'):
            first -= 1  # the comment above
        for line in lines[first:]:
            if line.startswith('# ---') or 'configurator.py' in line:
                break
            print(line)
        sys.exit(0)

    def apply_argument(argument):
        key, equals, text = argument.removeprefix('--').partition('=')
        is_flag = argument.startswith('--')
        if argument in ('--help', '-h'):
            print_help()
        elif not is_flag and not equals:
            apply_config_file(argument)
        elif not is_flag or not equals:
            refuse(f'unrecognized argument {argument!r}; set a setting with --key=value')
        elif key not in defaults:
            nearest = get_close_matches(key, defaults, 1, 0)
            hint = ''
            if nearest:
                hint = f'; did you mean {nearest[0]!r}?'
            refuse(f'unknown setting {key!r}{hint}')
        else:
            put(key, read_value(key, text), argument)

    for argument in sys.argv[1:]:
        apply_argument(argument)
    changed = [key for key in defaults if settings[key] != defaults[key]]
    overrides = [f'overriding: {key} = {settings[key]!r}' for key in changed if is_master]
    return list(defaults), overrides


config_keys, config_overrides = _configure(globals())
