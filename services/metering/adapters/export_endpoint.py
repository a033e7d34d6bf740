"""The operator's endpoint: records of use posted as signed CloudEvents."""

from services.kernel.webhook_sender import WebhookSender
from services.kernel.webhook_signing import DeliveryFailed
from services.metering.exports.cloud_event import CONTENT_TYPE, body_of
from services.metering.exports.outgoing import ExportRecords, Outgoing, TellFailed


class ExportEndpoint:
    """One URL, for all tenants."""

    def __init__(self, sender: WebhookSender, records: ExportRecords, url: str, signing_key: bytes, *, region: str) -> None:
        self._sender = sender
        self._records = records
        self._url = url
        self._signing_key = signing_key
        self._region = region

    async def tell(self, item: Outgoing) -> None:
        """Posts the record. Raises: TellFailed."""
        record = await self._records.read(item)
        if record is None:
            msg = "the record is not there"
            raise TellFailed(msg, may_have_arrived=item.send_time is not None, is_final=True)
        body = body_of(item, record, self._region)
        try:
            await self._sender.post(self._url, [self._signing_key], item.identifier, body, content_type=CONTENT_TYPE)
        except DeliveryFailed as error:
            raise TellFailed(str(error), may_have_arrived=True) from None
