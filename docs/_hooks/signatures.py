"""An extension of griffe, which reads the package for the reference.

It tells griffe three things that the text of the package does not:

- The signatures of the constructors. The classes are Equinox modules and named tuples.
- The meanings of fields and constants. The comments beside them become docstrings.
- What `jcnf.evaluate.log_prob` is where a function has the name of its file. It is the function, as
  for Python after `from jcnf.evaluate.log_prob import log_prob`.
"""

import importlib
import inspect

import griffe

KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}

MAX_SHOWN = 300  # letters of a dictionary


class Completed(griffe.Extension):
    """Completes the package once it has been read."""

    def on_package(self, *, pkg, loader, **_):
        """Complete the classes and constants, and let functions hide files of their name."""
        if pkg.name == "jcnf":
            _complete(pkg)
            loader.resolve_aliases(implicit=True)
            _hide_files(pkg)


def _hide_files(package):
    hidden = {}
    for module in list(_modules(package)):
        for name, member in list(module.members.items()):
            function = f"{member.path}.{name}"
            if not member.is_alias and member.is_module and module.imports.get(name) == function:
                hidden[member.path] = member.members[name]
                module.members[name] = griffe.Alias(name, member.members[name], parent=module)
    for module in _modules(package):
        for name, member in list(module.members.items()):
            if member.is_alias and member.target_path in hidden:
                function = hidden[member.target_path]
                module.members[name] = griffe.Alias(name, function, parent=module)


def _modules(module):
    yield module
    for member in list(module.members.values()):
        if not member.is_alias and member.is_module:
            yield from _modules(member)


def _complete(parent):
    for member in list(parent.members.values()):
        if member.is_alias:
            continue
        if member.is_class:
            _list_fields(member)
            _add_constructor(member)
        if member.is_attribute and parent.is_module and not member.docstring:
            text = "\n\n".join(filter(None, [_comment(member), _keys(member)]))
            member.docstring = griffe.Docstring(text, parent=member) if text else None
        if member.is_module or member.is_class:
            _complete(member)


def _comment(attribute):
    """Return the comment beside an assignment, or the one above it."""
    lines = attribute.lines_collection[attribute.filepath]
    last = lines[attribute.endlineno - 1]
    if "  # " in last and "noqa" not in last:
        return last.split("  # ", 1)[1].strip()
    above = []
    for line in reversed(lines[: attribute.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return " ".join(above)


def _keys(constant):
    """List the names in a dictionary, and drop a text of it that is long."""
    live = getattr(importlib.import_module(constant.parent.path), constant.name, None)
    if not isinstance(live, dict) or not all(isinstance(key, str) for key in live):
        return ""
    if len(str(constant.value)) > MAX_SHOWN:
        constant.value = None
    return f"The names are {', '.join(f'`{key}`' for key in live)}."


def _list_fields(cls):
    text = cls.docstring.value if cls.docstring else ""
    fields = [m for m in cls.members.values() if m.is_attribute and m.annotation is not None]
    fields = [m for m in fields if not (m.docstring or "property" in m.labels)]
    rows = [f"- `{m.name}`: {_comment(m).rstrip('.')}." for m in fields if _comment(m)]
    if rows and "**Arguments:**" not in text:
        text = "\n\n".join([text, "**Fields:**", "\n".join(rows)])
        cls.docstring = griffe.Docstring(text, parent=cls)


def _add_constructor(cls):
    if "__init__" in cls.members:
        return
    live = importlib.import_module(cls.module.path)
    for name in cls.path.removeprefix(cls.module.path + ".").split("."):
        live = getattr(live, name)
    try:
        parameters = inspect.signature(live).parameters.values()
    except ValueError:  # a protocol or an exception, which takes anything
        return
    constructor = griffe.Function("__init__", parent=cls, lineno=0, endlineno=0)
    self_ = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    known = [_parameter(cls, parameter) for parameter in parameters]
    constructor.parameters = griffe.Parameters(self_, *known)
    cls.set_member("__init__", constructor)


def _parameter(cls, parameter):
    annotation = None
    for parent in [cls, *cls.mro()]:
        inherited = parent.members.get("__init__")
        if inherited is not None and parameter.name in inherited.parameters:
            annotation = inherited.parameters[parameter.name].annotation
            break
        if parameter.name in parent.members and parent.members[parameter.name].is_attribute:
            annotation = parent.members[parameter.name].annotation
            break
    default = None if parameter.default is parameter.empty else _shown(parameter.default)
    return griffe.Parameter(
        parameter.name, annotation=annotation, kind=KINDS[parameter.kind], default=default
    )


def _shown(default):
    return default.__name__ if inspect.isroutine(default) else repr(default)
