"""More walls around who is calling, taken down one at a time: keys, tokens, issuers, services, regions, and what is remembered of them."""

from tests.isolation.mutations import CALLERS, CREDENTIALS, WALLS, one

FORGED = f"{CREDENTIALS}::test_a_forged_context_convinces_no_rpc"
RESOLVER = "tests/kernel/test_credential_resolver.py"
FEED = "tests/kernel/test_credentials_and_feed.py"
CONTEXTS = "tests/kernel/test_context_token.py"
SMALL_MESH = "tests/kernel/test_auth.py"
AUTHENTICATION = "tests/tenant/test_authentication.py"
JWT = "tests/tenant/test_jwt.py"
ISSUERS = "tests/tenant/test_issuers.py"
REMEMBERED = f"{WALLS}::test_what_is_remembered_of_a_tenant_is_its_own"

_AUTHENTICATION = "services/tenant/authentication.py"
_JWT = "services/tenant/jwt_proof.py"
_AUTH = "services/kernel/rpc/auth.py"
_IDENTITY = "services/kernel/rpc/identity.py"
_POLICY = "services/kernel/rpc/policy.py"
_TOKENS = "services/kernel/context_token.py"
_RESOLVER = "services/kernel/credential_resolver.py"
_ANSWERS = "services/kernel/credential_answers.py"
_IDENTITY_SQL = "services/tenant/migrations/0004_identity.sql"
_QUESTION = "key = (digest, claimed_tenant_id, current_peer_address(), operator_reason(), tenant_host(), tenant_path())"

_KEYS = (
    one(
        "an expired key goes on",
        _AUTHENTICATION,
        "return None if expire_time is None or expire_time > now else",
        "return None if expire_time is None or now is not None else",
        f"{AUTHENTICATION}::test_an_expired_key_says_so_to_who_holds_its_secret",
    ),
    one(
        "a key is good from every network",
        _AUTHENTICATION,
        "if stored.allowed_cidrs and not is_within(attempt.peer_address, stored.allowed_cidrs):",
        "if stored.allowed_cidrs and not attempt.credential:",
        f"{CREDENTIALS}::test_a_stolen_key_is_a_wrong_key_outside_its_networks",
    ),
    one(
        "authentication does not compare the tenant that is claimed",
        _AUTHENTICATION,
        "if claimed not in (None, grant.tenant_id):",
        "if claimed not in (None, claimed):",
        f"{AUTHENTICATION}::test_a_swapped_tenant_claim_is_refused_and_audited",
    ),
    one(
        "a suspended tenant's keys go on",
        _AUTHENTICATION,
        "self._refuse_unusable(stored.tenant_id, stored.facts,",
        "self._refuse_unusable(stored.tenant_id, replace(stored.facts, state=TenantState.ACTIVE),",
        f"{AUTHENTICATION}::test_a_suspended_tenants_keys_are_refused_as_suspended",
    ),
    one(
        "authentication lets other regions' tenants in",
        _AUTHENTICATION,
        "            _refuse_state(facts)\n            self._cell.refuse_elsewhere(facts.region)\n",
        "            _refuse_state(facts)\n",
        "tests/tenant/test_placement.py::test_another_regions_tenant_is_not_authenticated_here",
    ),
    one(
        "an operator's access is not on record",
        "services/tenant/adapters/postgres_credentials.py",
        "FROM tenant.record_operator_access($1, $2, $3, $4)",
        "FROM tenant.facts($1) WHERE $2 || $3 || $4 IS NOT NULL",
        f"{CALLERS}::test_whatever_an_operator_does_is_in_the_tenants_audit_log",
    ),
    one(
        "an operator reaches tenants' methods without naming one",
        _POLICY,
        "    if call.tenant.tenant_id is None:\n",
        "    if call.tenant.tenant_id is False:\n",
        f"{CALLERS}::test_an_operator_names_its_tenant_and_spends_none_of_its_money",
    ),
)

_ISSUERS = (
    one(
        "a JWT is signed as it says itself",
        _JWT,
        "if token.algorithm not in {algorithm.value for algorithm in terms.algorithms}:",
        "if token.algorithm not in {algorithm.value for algorithm in Algorithm}:",
        f"{JWT}::test_a_key_proves_with_the_registered_algorithm_alone",
    ),
    one(
        "a JWT's issuer and audience are not compared",
        _JWT,
        "if token.issuer != terms.issuer or terms.audience not in token.audiences:",
        "if terms is None:",
        f"{WALLS}::test_the_claims_alone_are_held_against_the_registration",
    ),
    one(
        "any audience leads to an issuer",
        _IDENTITY_SQL,
        "WHERE d.issuer = p_issuer AND d.audience = ANY (p_audiences);",
        "WHERE d.issuer = p_issuer AND p_audiences IS NOT NULL;",
        f"{ISSUERS}::test_a_registration_is_found_by_issuer_and_audience_together",
    ),
    one(
        "an issuer of two tenants speaks for one of them",
        _IDENTITY_SQL,
        "    IF coalesce(cardinality(v_found), 0) <> 1 THEN\n",
        "    IF coalesce(cardinality(v_found), 0) < 1 THEN\n",
        f"{ISSUERS}::test_an_issuer_and_audience_speak_for_one_tenant_only",
    ),
    one(
        "a JWT does not end",
        _JWT,
        "    if end_time + skew <= now:\n",
        "    if end_time is None:\n",
        f"{JWT}::test_an_ended_token_says_when_it_ended",
    ),
    one(
        "a JWT grants itself scopes",
        _JWT,
        "_scopes(claims) & terms.scopes & TENANT_SCOPES",
        "_scopes(claims) & TENANT_SCOPES",
        f"{JWT}::test_a_token_of_a_registered_issuer_speaks_for_its_tenant",
    ),
    one(
        "a suspended tenant's JWTs go on",
        _AUTHENTICATION,
        "        self._refuse_unusable(known.tenant_id, known.facts, proven.subject, attempt)\n",
        "",
        f"{JWT}::test_a_suspended_tenants_tokens_are_refused",
    ),
)

_CONTEXTS = (
    one("context tokens live as long as they say", _TOKENS, " or expires - issued > MAX_LIFETIME:", ":", FORGED),
    one("context tokens may be of the future", _TOKENS, " or issued > now + _CLOCK_SKEW", "", FORGED),
    one(
        "a context token need not name a tenant",
        _TOKENS,
        "if len(claims.tenant_id) not in ((0, 16) if claims.operator else (16,)):",
        "if len(claims.tenant_id) not in (0, 16):",
        FORGED,
    ),
    one(
        "a remembered context token does not end",
        _TOKENS,
        "            if context.expire_time > self._clock():\n",
        "            if context.expire_time is not None:\n",
        f"{CONTEXTS}::test_a_token_ends_at_its_time_even_when_it_was_verified_before",
    ),
    one(
        "records are proven by unsigned tokens",
        _TOKENS,
        "            try:\n                key.verify(signature, payload)\n            except InvalidSignature:\n"
        "                raise _invalid() from None\n            self._signed",
        "            del key, signature\n            self._signed",
        f"{CONTEXTS}::test_the_past_is_proven_by_signature_alone",
    ),
    one(
        "records are proven by tokens that ended long ago",
        _TOKENS,
        "        if moment > expires + grace:\n",
        "        if moment > expires + grace + timedelta(days=1):\n",
        f"{CONTEXTS}::test_a_token_that_ended_still_proves_what_it_proved",
    ),
    one(
        "a context token from outside is believed",
        _AUTH,
        "        if service is None:\n",
        "        if service is None and token is None:\n",
        f"{CREDENTIALS}::test_a_real_context_is_worth_nothing_outside",
    ),
    one(
        "a service acts for other regions' tenants",
        _AUTH,
        "            _refuse_mismatch(tenant, _claimed_tenant(call))\n            self._cell.refuse_elsewhere(tenant.region)\n",
        "            _refuse_mismatch(tenant, _claimed_tenant(call))\n",
        f"{SMALL_MESH}::test_a_tenant_of_another_region_is_sent_to_its_cell",
    ),
    one(
        "callers of other regions' tenants are let in",
        _AUTH,
        "        _refuse_mismatch(tenant, claimed)\n        self._cell.refuse_elsewhere(tenant.region)\n",
        "        _refuse_mismatch(tenant, claimed)\n",
        f"{SMALL_MESH}::test_a_tenant_of_another_region_is_sent_to_its_cell",
    ),
)

_SERVICES = (
    one(
        "a bearer stands in for a certificate",
        _IDENTITY,
        "        if self._tls:\n",
        "        if self._tls and MESH_SERVICE not in metadata:\n",
        f"{CALLERS}::test_on_tls_a_services_bearer_is_worth_nothing",
    ),
    one(
        "a certificate may name two services",
        _IDENTITY,
        "    if len(names) != 1:\n",
        "    if not names:\n",
        "tests/kernel/test_mtls.py::test_one_certificate_is_one_service",
    ),
    one(
        "plaintext is served beyond loopback",
        "services/kernel/settings.py",
        "if not all(files) and not is_loopback(self.listen_address):",
        "if not all(files) and not self.listen_address:",
        "tests/kernel/test_settings.py::test_plaintext_is_bound_to_loopback_only",
    ),
    one(
        "a method that declares no policy is served",
        _POLICY,
        "                missing.append(path)\n",
        "                pass\n",
        "tests/kernel/test_policy.py::test_a_server_with_an_undeclared_method_refuses_to_start",
    ),
    one(
        "an unexpected error tells its text",
        "services/kernel/rpc/status.py",
        "internal error; tell the operator the trace id {current_trace_id()}",
        "internal error; tell the operator the trace id {current_trace_id()}; {error!r}",
        "tests/kernel/test_status.py::test_an_unexpected_error_keeps_its_text_to_itself",
    ),
)

_REMEMBERED = (
    one(
        "an answer is good for any claimed tenant",
        _RESOLVER,
        _QUESTION,
        _QUESTION.replace("claimed_tenant_id", "None"),
        f"{RESOLVER}::test_each_claimed_tenant_is_its_own_question",
    ),
    one(
        "an answer is good for any host",
        _RESOLVER,
        _QUESTION,
        _QUESTION.replace("tenant_host()", '""'),
        f"{RESOLVER}::test_each_named_host_and_path_is_its_own_question",
    ),
    one(
        "an answer is good for any path",
        _RESOLVER,
        _QUESTION,
        _QUESTION.replace("tenant_path()", '""'),
        f"{RESOLVER}::test_each_named_host_and_path_is_its_own_question",
    ),
    one(
        "an answer is good for any address",
        _RESOLVER,
        _QUESTION,
        _QUESTION.replace("current_peer_address()", '""'),
        f"{RESOLVER}::test_each_address_and_reason_is_its_own_question",
    ),
    one(
        "an operator's answer is good for any reason",
        _RESOLVER,
        _QUESTION,
        _QUESTION.replace("operator_reason()", '"the first"'),
        f"{RESOLVER}::test_each_address_and_reason_is_its_own_question",
    ),
    one(
        "a silent feed is trusted",
        _RESOLVER,
        "        if state is FeedState.STALE:\n",
        "        if state is None:\n",
        f"{FEED}::test_a_silent_feed_ends_all_trust_without_asking",
    ),
    one(
        "a change is not heard by what is remembered",
        _RESOLVER,
        "            feed.subscribe(self._answers.forget)\n",
        "            pass\n",
        f"{FEED}::test_a_change_ends_the_trust_in_its_tenant_alone",
    ),
    one(
        "an answer that a change overtook is remembered",
        _ANSWERS,
        "        if max(forgotten, self._all_forgotten, self._hosts_forgotten if key[_HOST] else 0) > heard:\n",
        "        if max(forgotten, self._all_forgotten, self._hosts_forgotten if key[_HOST] else 0) < 0:\n",
        f"{FEED}::test_an_answer_that_a_change_overtook_is_not_believed",
    ),
    one(
        "a host goes on naming nobody once it is another tenant's",
        _ANSWERS,
        "        if kind == _DOMAIN:\n",
        "        if kind is None:\n",
        f"{FEED}::test_a_domain_given_to_another_tenant_ends_the_trust_in_who_came_by_a_host",
    ),
    one(
        "an operator's answer is remembered as a tenant's",
        _RESOLVER,
        "        if state is FeedState.UNSERVED or answer.context.operator:\n",
        "        if state is FeedState.UNSERVED:\n",
        f"{FEED}::test_an_operators_answer_is_never_older_than_a_second",
    ),
    one(
        "an outage brings a refused key back",
        _RESOLVER,
        "            self._answers.drop(key)\n",
        "            pass\n",
        f"{RESOLVER}::test_a_revoked_key_does_not_come_back_in_an_outage",
    ),
    one(
        "tenants share a remembered configuration",
        "services/kernel/tenant_config.py",
        "self._cache.get((context.tenant_id, max(at_least, context.config_version)), ",
        "self._cache.get((TenantId(type(context.tenant_id)(int=0)), max(at_least, context.config_version)), ",
        REMEMBERED,
    ),
    one(
        "tenants share a remembered provider key",
        "services/inference/adapters/provider_keys_client.py",
        "self._cache.get(context.tenant_id, ",
        "self._cache.get(TenantId(type(context.tenant_id)(int=0)), ",
        REMEMBERED,
    ),
    one(
        "tenants share remembered data keys",
        "services/kernel/tenant_cipher.py",
        "        tenant_id, context = _named(tenant)\n        known = self._cache.peek(tenant_id)\n",
        "        tenant_id, context = _named(tenant)\n        known = next(iter(vars(self).setdefault('_all', {}).values()), None)\n"
        "        known = vars(self)['_all'][tenant_id] = known or await self._fetched(tenant_id, context)\n",
        REMEMBERED,
    ),
)

IDENTITY_MUTATIONS = (*_KEYS, *_ISSUERS, *_CONTEXTS, *_SERVICES, *_REMEMBERED)
