import dataclasses, json


@dataclasses.dataclass
class Run:
    name: str
    folder: object
    results: dict
    history: list
    documents: dict
    programs: dict


def draw(out, results, history):
    return []


def write_html(out, results, charts, samples):
    pass


def table(results):
    return json.dumps({k: v for k, v in results.items() if "/" in k}, indent=1)


def compare(out, runs):
    return "-"
