"""``python -m checks digest 2.1 209715200`` prints the digest that a `Value` stores."""

import ast
import sys

import checks

match sys.argv[1:]:
    case ["digest", number, text]:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        print(checks.digest(number, value))
    case _:
        sys.exit("usage: python -m checks digest NUMBER VALUE    (as in: digest 2.1 209715200)")
