"""docs/grafana.json asks for what /metrics has, and for nothing else."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.support import serving

DASHBOARD = json.loads((Path(__file__).parent.parent.parent / "docs" / "grafana.json").read_text())


def base(name: str) -> str:
    return re.sub(r"(_total|_bucket|_count|_sum)+$", "", name)


def test_every_query_names_what_there_is(tiny):
    with serving(tiny(enable_prefix_caching=False)) as live:
        live.post("/v1/completions", prompt="a", max_tokens=3, ignore_eos=True)
        families = list(text_string_to_metric_families(live.http.get("/metrics").text))
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert len(queries) >= 30
    asked = set()
    for query in queries:
        names = re.findall(r"jpaged:\w+", query)
        assert names, query
        for name in names:
            assert name in labels, f"{name} is not in /metrics"
            for label in re.findall(r"by \((\w+)\)|(\w+)=~|, (\w+)\)$", query):
                assert set(label) - {""} <= labels[name], query
        asked |= set(names)
    there = {base(family.name) for family in families if not family.name.endswith("_created")}
    unasked = there - set(map(base, asked))
    assert unasked <= {"jpaged:cache_config_info", "jpaged:cache_config", "jpaged:request_params_n"}


def test_it_is_what_grafana_imports():
    """The fields that its importer and its panels read."""
    assert isinstance(DASHBOARD["title"], str)
    assert isinstance(DASHBOARD["uid"], str)
    assert len(DASHBOARD["uid"]) <= 40
    assert DASHBOARD["schemaVersion"] >= 36, "data sources by uid, in panels of today's kinds"
    assert "id" not in DASHBOARD, "an id belongs to one installation"
    assert "__inputs" not in DASHBOARD, "the data source is a variable, so that importing asks nothing"
    variables = {one["name"]: one["type"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model": "query"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in ("timeseries", "stat", "gauge", "heatmap", "bargauge"), panel["title"]
        assert panel["title"]
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert all(target["datasource"] == source for target in panel["targets"])


def test_queries_are_in_balance():
    """Brackets, and a range for each rate; counters are asked for as rates and no gauge is."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for opening, closing in ("()", "{}", "[]"):
                assert query.count(opening) == query.count(closing), query
            assert query.count("rate(") == query.count("[$__rate_interval]"), query
            for name in re.findall(r"jpaged:\w+(?:_total|_bucket|_count|_sum)\b", query):
                assert re.search(rf"(rate|increase)\({name}", query), query


def test_panels_have_places_of_their_own():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
