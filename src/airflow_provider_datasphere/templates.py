"""Templated fields that stay text, even if the DAG renders templates to native Python objects.

With ``render_template_as_native_obj=True`` Airflow makes a number of the text ``"1"`` and a list of ``"[draft]"``, of
literals too. DataSphere's arguments are text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_provider_datasphere.client.validation import NONE_TEXT

if TYPE_CHECKING:
    import jinja2

    from airflow_provider_datasphere.compat import BaseOperator, Context

    _Base = BaseOperator
else:
    _Base = object

#: Prefix of a template, so that what it renders to is no Python literal; on a line of its own it changes nothing else.
_GUARD = "\x02"


class TextTemplates(_Base):
    """Mixin of an operator or sensor, before its Airflow base class.

    Text without a template in it stays exactly as it is. A template inside a mapping or list renders to text, and to
    ``None`` where its value is ``None``, so that the checks refuse it instead of passing on the word "None".
    """

    #: Templated fields that are text.
    text_fields: ClassVar[Collection[str]] = ()
    #: Templated fields that are text or made of text. A template that is the whole field may give a native mapping,
    #: list or timedelta; a number or other plain value is taken as text.
    text_containers: ClassVar[Collection[str]] = ()

    _field: str | None = None

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        # Airflow's own hook for this: it renders the fields of a mapped task by this method too.
        for name in template_fields:
            self._field = name if parent is self else None
            try:
                super()._do_render_template_fields(parent, (name,), context, jinja_env, seen_oids)
            finally:
                self._field = None

    def render_template(
        self,
        content: Any,
        context: Context,
        jinja_env: jinja2.Environment | None = None,
        seen_oids: set[int] | None = None,
    ) -> Any:
        field = self._field
        if field not in self.text_fields and field not in self.text_containers:
            return super().render_template(content, context, jinja_env, seen_oids)
        env = jinja_env or self.get_template_env()
        if not isinstance(content, str):
            return self.render_inside(content, context, env)
        if field in self.text_containers and _is_template(content, env) and _is_native(env):
            value = super().render_template(content, context, env)
            if not isinstance(value, (str, bytes, bool, int, float, complex)):
                return value
        text = self.render_text(content, context, env)
        return None if text == NONE_TEXT and _is_native(env) and _is_template(content, env) else text

    def render_inside(self, value: Any, context: Context, env: jinja2.Environment) -> Any:
        """Render the texts in a value; a template whose value is ``None`` renders to that."""
        if isinstance(value, str):
            text = self.render_text(value, context, env)
            return None if text == NONE_TEXT and _is_template(value, env) else text
        if type(value) in (list, tuple, set):
            return type(value)(self.render_inside(part, context, env) for part in value)
        if type(value) is dict:
            return {key: self.render_inside(part, context, env) for key, part in value.items()}
        return super().render_template(value, context, env)

    def render_text(self, text: str, context: Context, env: jinja2.Environment) -> str:
        """Render a template to text, whatever the DAG renders templates to."""
        if not _is_template(text, env):
            return text
        if not _is_native(env) or text.endswith(tuple(self.template_ext)):
            return str(super().render_template(text, context, env))
        rendered = str(super().render_template(f"{_GUARD}\n{text}", context, env))
        return rendered.removeprefix(f"{_GUARD}{env.newline_sequence}")


def _is_template(text: str, env: jinja2.Environment) -> bool:
    """Return whether Jinja would change this text; a DAG may have other delimiters than ``{{``."""
    marks = (
        env.variable_start_string,
        env.block_start_string,
        env.comment_start_string,
        env.line_statement_prefix,
        env.line_comment_prefix,
    )
    return any(mark in text for mark in marks if mark)


def _is_native(env: jinja2.Environment) -> bool:
    from jinja2.nativetypes import NativeEnvironment

    return isinstance(env, NativeEnvironment)
