"""The demo tells only what is true."""

from devstack.demo import Story
from devstack.handbook import HARBOR, LUMEN
from tests.support.mesh import Mesh


async def test_every_claim_of_the_demo_holds(mesh: Mesh) -> None:
    """Own documents, nothing of the other's, a refusal that explains itself, a forged tenant refused, an exact bill."""
    tenants = {company.slug: await mesh.another(company) for company in (LUMEN, HARBOR)}
    checks = [check async for check in Story(mesh.client, tenants).tell()]
    assert [(check.name, check.seen) for check in checks if not check.passed] == []
    assert len(checks) == 5
