# The command line of every script: python SCRIPT [CONFIG.py ...] [--key=value ...]
#
#     exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
#
# stands below a script's settings, which are its public module-level variables that hold an int,
# float, bool or str. It executes the config files and sets the keys, from left to right; the last
# one counts. It is executed and not imported, so that `learning_rate` is a plain variable
# everywhere. What it cannot read it refuses in one line, with exit code 2.
#
# It leaves `config_keys`, the names of the settings, and `config_overrides`, a line for each
# setting that is not at its default, for the script to print once the settings have been checked.

def _configure(settings):  # noqa: C901  it is small functions, which the script need not see
    """ Applies sys.argv to `settings`, the script's globals -> config_keys, config_overrides. """
    import ast
    import math
    import os
    import re
    import sys
    from difflib import get_close_matches
    from glob import glob

    def settings_in(names):
        return {key: value for key, value in names.items()
                if not key.startswith('_') and type(value) in (int, float, bool, str)}

    defaults = settings_in(settings)
    is_master = os.environ.get('RANK', '0') == '0'

    def refuse(message):
        message = ' '.join(message.split())  # one line
        print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
        sys.exit(2)

    def put(key, value, source):
        """ Sets a key, if its value has the type of the default or converts without a loss. """
        kind = type(defaults[key])
        is_auto = defaults[key] == 'auto'  # such a setting may also be True or False
        if getattr(value, 'shape', None) == ():  # a NumPy number
            value = value.item()
        if kind is float and type(value) is int:
            value = float(value)  # 1 for 1.0
        elif kind is int and type(value) is float and value.is_integer():
            value = int(value)  # 6e5 for 600000
        elif is_auto and value in ('True', 'False'):
            value = value == 'True'
        if type(value) is not kind and not (is_auto and type(value) is bool):
            required = {bool: 'True or False', int: 'an integer', float: 'a number',
                        str: 'a string'}
            refuse(f'{source}: {key} requires {required[kind]}, not {value!r}')
        settings[key] = value

    def read_value(key, text):
        """ The value of --key=text: a string setting takes the text as it is. """
        if type(defaults[key]) is str:
            return text
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def did_you_mean(word, choices, cutoff):
        """ The hint of a message that refuses `word`; '' if no choice is similar enough. """
        nearest = get_close_matches(word, choices, 1, cutoff)
        return f'; did you mean {nearest[0]!r}?' if nearest else ''

    def check_config_file(path):
        if not os.path.isfile(path):
            paths = glob(os.path.join(os.path.dirname(settings['__file__']), 'config', '*.py'))
            by_name = {os.path.basename(existing): existing for existing in paths}
            nearest = get_close_matches(os.path.basename(path), by_name, 1)
            hint = 'settings are given as --key=value'
            if nearest:
                hint = f'did you mean {os.path.relpath(by_name[nearest[0]])}?'
            refuse(f'config file {path!r} does not exist; {hint}')
        if not path.endswith('.py'):
            refuse(f'config file {path!r} does not end in .py; settings are given as --key=value')

    def execute(path):
        """ Executes a config file -> its variables, the script's settings among them. """
        names = dict(settings)
        try:
            with open(path, encoding='utf-8') as file:
                exec(file.read(), names)
        except SyntaxError as error:
            refuse(f'{path}, line {error.lineno}: SyntaxError: {error.msg}')
        except Exception as error:
            trace = error.__traceback__.tb_next or error.__traceback__
            refuse(f'{path}, line {trace.tb_lineno}: {type(error).__name__}: {error}')
        return names

    def as_in_nanogpt(key, value):
        """ A value of a config file, as the type of the default: None, for a str, is ''. """
        kind = type(defaults[key])
        if kind is bool and value in (0, 1):
            return bool(value)
        if kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if kind is int and isinstance(value, float) and math.isfinite(value):
            return round(value)
        return '' if kind is str and value is None else value

    def apply_config_file(path):
        check_config_file(path)
        names = execute(path)
        changed = [key for key in defaults if key in names and names[key] is not settings[key]]
        unknown = [key for key in settings_in(names) if key not in settings]
        for key in unknown:
            # a helper variable is fine; one that looks like a setting that the file does not set
            # is a typo
            hint = did_you_mean(key, [other for other in defaults if other not in changed], 0.8)
            if hint:
                refuse(f'{path}: unknown setting {key!r}{hint}')
        if unknown and is_master:
            print(f'{path}: ignored, not settings of this script: {", ".join(unknown)}')
        for key in changed:
            put(key, as_in_nanogpt(key, names[key]), path)

    def print_help():
        """ Prints the docstring, and the settings, which stand below a line of dashes. """
        print((settings['__doc__'] or '').strip())
        with open(settings['__file__'], encoding='utf-8') as file:
            text = file.read()
        block = re.search(r'^# ---+\n(.*?)^(# ---|exec)', text, re.DOTALL | re.MULTILINE)
        if block:
            print(block[1].strip())
        sys.exit(0)

    for argument in sys.argv[1:]:
        key, equals, text = argument.removeprefix('--').partition('=')
        is_flag = argument.startswith('--')
        if argument in ('--help', '-h'):
            print_help()
        elif not is_flag and not equals:
            apply_config_file(argument)
        elif not is_flag or not equals:
            refuse(f'unrecognized argument {argument!r}; set a setting with --key=value')
        elif key not in defaults:
            refuse(f'unknown setting {key!r}{did_you_mean(key, defaults, 0)}')
        else:
            put(key, read_value(key, text), argument)

    overrides = [f'overriding: {key} = {settings[key]!r}' for key in defaults
                 if settings[key] != defaults[key] and is_master]
    return list(defaults), overrides


config_keys, config_overrides = _configure(globals())
