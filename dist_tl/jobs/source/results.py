"""Results of a source job: its models, and how accurate the classifier is."""

from dist_tl.jobs.source.run import SourceOutcome
from dist_tl.report.results import Study, Table


def results(outcome: SourceOutcome) -> Study:
    """The two models and their figures."""
    source = outcome.source
    assert source.classifier_accuracy is not None, "training a source measures it"
    accuracy = f"{source.classifier_accuracy:.1%}"
    table = Table(
        title="Models",
        header=("model", "location in the run", "fingerprint"),
        rows=(
            ("source classifier", source.classifier, source.classifier_fingerprint),
            ("conditional generator", source.generator.path, source.generator_fingerprint),
        ),
        note="A transfer job names both under `source`, by URL.",
    )
    return Study(
        verdict=f"The source classifier has {accuracy} accuracy on held-out source images.",
        findings=(f"{source.num_held_out} source images were held out from both trainings.",),
        tables=(table,),
        facts=(
            ("Classes", f"{source.num_classes}"),
            ("Images (channels, height, width)", f"{tuple(source.image_shape)}"),
        ),
    )
