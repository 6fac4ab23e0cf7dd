"""Templates like those that models come with: every construct that they use, and nothing strange."""

from __future__ import annotations

from tests.text.kinds import CHATML

ORDINARY = {
    "chatml": CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}"
    "{% set c = '<|h|>' + m['role'] + '<|e|>\n\n' + m['content'] | trim %}{% if loop.index0 == 0 %}"
    "{% set c = '!' + c %}{% endif %}{{ c }}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}"
    "{% endif %}",
    "mistral": "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}["
    "{{ m.role|upper }}{% if loop.last and s is defined %} {{ s }}{% endif %}] {{ m.content }}"
    "{% endfor %}",
    "namespace": "{% set n = namespace(last=-1, seen=[]) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}{{ n.last }} of {{ messages|length }}",
    "backwards": "{% for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}{{ i }}"
    "{{ m.role[0] }} {% endfor %}",
    "think": "{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}{% endfor %}",
    "loop control": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "loop facts": "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} "
    "{{ loop.revindex0 }} {{ loop.previtem.role if loop.previtem is defined }}"
    "{{ loop.nextitem is defined }} {{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }};"
    "{% endfor %}",
    "macros": "{% macro say(m, end='!') %}{{ m.role ~ ': ' ~ m.content }}{{ end }}{{ caller() if caller }}"
    "{% endmacro %}{{ say(messages[0]) }}{% call say(messages[1], end='?') %}<{{ 1 + 2 * 3 }}>"
    "{% endcall %}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }} {{ messages|join('+', attribute='role') }} "
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} "
    "{{ messages|rejectattr('role', 'eq', 'user')|map(attribute='content')|first|trim }} "
    "{{ 'a-b-c'|replace('-', '+')|title }}{{ 'a-b-c'|replace('-', '+', 1) }} {{ 'x\ny\n\nz'|indent(4) }}|"
    "{{ 'x\ny\n\nz'|indent(2, true, blank=true) }}|{{ {'b': 1, 'a': 2}|dictsort }} "
    "{{ none|default('d', true) }} {{ 7|string }} {{ '7'|int + 1 }}",
    "operators": "{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 5 }} {{ 1.5 * 2 }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ -3 }} "
    "{{ 1 if none else 2 }} {{ not true }}",
    "methods": "{{ 'a,b'.split(',') }} {{ '-'.join(['x', 'y']) }} {{ 'xyx'.replace('x', 'z') }} "
    "{{ ' q '.strip() }} {{ 'ab'.startswith('a') }} {{ messages[0].items()|list }} "
    "{{ messages[0].get('nothing', 'd') }} {{ 'Q'.lower() }}{{ 'aXb'.rpartition('X') }}",
    "tests": "{{ x is defined }} {{ messages is iterable }} {{ 'a' is string }} {{ {} is mapping }} "
    "{{ 3 is odd }} {{ none is none }} {{ 1 in [1] }}",
    "blocks": "{% set x %}{{ messages[0].role }}!{% endset %}{{ x * 2 }}{% filter upper %}abc{% endfilter %}"
    "{% with y = 2 %}{{ y }}{% endwith %}",
    "nested": "{% for m in messages recursive %}{{ m.role }}{% if loop.depth < 2 %}({{ loop(messages[:2]) }})"
    "{% endif %}{% endfor %}",
    "loop with a test": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
    "nothing to loop over": "{% for m in [] %}x{% else %}none{% endfor %}{% for m in missing %}x{% else %}none{% endfor %}",
    "pairs": "{% for key, value in {'a': 1}.items() %}{{ key }}={{ value }}{% endfor %}"
    "{% for k in messages[0]|items %}{{ k }}{% endfor %}",
}
