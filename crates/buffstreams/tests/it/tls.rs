//! TLS over real sockets: who is let in, what is said to who is not, and that it costs nobody else anything.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{
    Address, Connection, ConnectionBuilder, Delivery, Discard, ErrorKind, Event, Listener, ListenerBuilder, Peer,
    Retry, Server, Service, State, TlsClient, TlsServer, blocking, per_connection,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType, date_time_ymd,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::support::{Echo, PATIENCE, Recorder, closed, connect, in_time, until};

/// A folder with an authority, which issues certificates into it.
pub(crate) struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let folder = tempfile::tempdir().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        fs::write(folder.path().join("ca.pem"), parameters.self_signed(&key).unwrap().pem()).unwrap();
        Authority { folder, issuer: Issuer::new(parameters, key) }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Writes `NAME.pem` and `NAME.key`.
    fn issue(&self, name: &str, alternatives: &[&str]) {
        self.issue_with(name, alternatives, |_| {});
    }

    fn issue_expired(&self, name: &str, alternatives: &[&str]) {
        self.issue_with(name, alternatives, |parameters| parameters.not_after = date_time_ymd(2020, 1, 1));
    }

    fn issue_with(&self, name: &str, alternatives: &[&str], change: impl FnOnce(&mut CertificateParams)) {
        let (uris, names): (Vec<&str>, Vec<&str>) = alternatives.iter().partition(|name| name.contains("://"));
        let names: Vec<_> = names.into_iter().map(String::from).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        parameters.subject_alt_names.extend(uris.into_iter().map(|uri| SanType::URI(uri.try_into().unwrap())));
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut parameters);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    pub(crate) fn server(&self, name: &str) -> TlsServer {
        TlsServer::from_pem_files(self.path(&format!("{name}.pem")), self.path(&format!("{name}.key"))).unwrap()
    }

    /// Believes this authority.
    pub(crate) fn client(&self) -> TlsClient {
        TlsClient::with_ca_file(self.path("ca.pem")).unwrap()
    }

    fn certified(&self, name: &str) -> TlsClient {
        self.client().certificate(self.path(&format!("{name}.pem")), self.path(&format!("{name}.key"))).unwrap()
    }
}

/// An authority that has issued a certificate for this machine.
pub(crate) fn authority() -> Authority {
    let authority = Authority::new("Authority of the tests");
    authority.issue("server", &["localhost", "127.0.0.1"]);
    authority
}

async fn serve(tls: TlsServer, service: impl Service) -> Server {
    serve_with(Listener::builder(), tls, service).await
}

async fn serve_with(builder: ListenerBuilder, tls: TlsServer, service: impl Service) -> Server {
    builder.tls(tls).bind("127.0.0.1:0").await.unwrap().spawn(service)
}

fn port(address: &Address) -> u16 {
    let Address::Tcp { port, .. } = address else { panic!("a TCP address was asked for") };
    *port
}

async fn refused(builder: ConnectionBuilder, address: &Address) -> String {
    let error = in_time("the refusal", builder.dial(address)).await.expect_err("it is refused");
    assert_eq!(error.kind(), ErrorKind::Tls, "{error}");
    error.to_string()
}

#[tokio::test]
async fn messages_and_replies_go_over_tls_plain_and_acknowledged() {
    let authority = authority();
    // There is room for all replies: one that finds none is an error of the handler's.
    let builder = Listener::builder().reply_memory(16 * 1024 * 1024);
    let service = per_connection(|peer: &Peer| Echo(peer.clone()));
    let server = serve_with(builder, authority.server("server"), service).await;
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let record = Recorder::default();
        let builder = Connection::builder().delivery(delivery).max_message_size(4096).handler(record.clone());
        let address = format!("localhost:{}", port(server.local_address()));
        let connection = in_time("dialling", builder.tls(authority.client()).dial(address)).await.unwrap();
        let sent: Vec<Vec<u8>> = (0..2000_usize).map(|number| vec![number as u8; number * 2]).collect();
        for message in &sent {
            connection.send(message).await.unwrap();
        }
        record.has(sent.len()).await;
        assert!(record.messages() == sent, "what comes back is what was sent");
        let stats = in_time("closing", connection.close(PATIENCE)).await.unwrap();
        assert_eq!((stats.settled, stats.failed), (2000, 0));
    }
    let report = in_time("the shutdown", server.shutdown(PATIENCE)).await;
    let counted = (report.received.messages, report.received.broken, report.received.broken_handshake);
    assert_eq!(counted, (4000, 0, 0));
}

#[test]
fn code_that_blocks_speaks_tls_too() {
    let authority = authority();
    let builder = Listener::builder().tls(authority.server("server"));
    let server = blocking::Listener::bind_with(builder, "127.0.0.1:0").unwrap().spawn(|_: &[u8]| Ok(()));
    let builder = Connection::builder().tls(authority.client()).delivery(Delivery::Acked);
    let connection = blocking::Connection::dial_with(builder, server.local_address()).unwrap();
    connection.send(b"hello").unwrap();
    assert_eq!(connection.close(PATIENCE).unwrap().settled, 1);
    assert_eq!(server.shutdown(PATIENCE).received.messages, 1);
}

#[tokio::test]
async fn a_server_that_is_not_who_it_should_be_is_refused_and_named() {
    let authority = authority();
    authority.issue("elsewhere", &["elsewhere.example", "10.1.2.3"]);
    authority.issue_expired("expired", &["127.0.0.1"]);
    authority.issue_with("authority", &["127.0.0.1"], |parameters| {
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let other = Authority::new("Somebody else");
    other.issue("server", &["127.0.0.1"]);
    for (tls, words) in [
        (authority.server("authority"), vec!["that of an authority", "CA:FALSE"]),
        (authority.server("elsewhere"), vec!["elsewhere.example", "10.1.2.3", "should be for 127.0.0.1"]),
        (authority.server("expired"), vec!["has expired", "days ago"]),
        (other.server("server"), vec!["\"Somebody else\"", "ca.pem"]),
    ] {
        let record = Recorder::default();
        let server = serve(tls, record.clone()).await;
        for delivery in [Delivery::Sent, Delivery::Acked] {
            let builder = Connection::builder().delivery(delivery).tls(authority.client());
            let text = refused(builder, server.local_address()).await;
            for word in words.iter().chain([&&*server.local_address().to_string()]) {
                assert!(text.contains(word), "{word} in: {text}");
            }
        }
        until("the server knows", || server.stats().broken_handshake == 2).await;
        until("both are gone", || server.stats().open == 0).await;
        assert_eq!((server.stats().broken, record.peers().len()), (2, 0));
    }
}

#[tokio::test]
async fn a_name_of_ones_own_is_demanded_instead_of_the_address() {
    let authority = authority();
    authority.issue("elsewhere", &["elsewhere.example"]);
    let server = serve(authority.server("elsewhere"), Recorder::default()).await;
    let tls = authority.client().server_name("elsewhere.example").unwrap();
    let connection = Connection::builder().tls(tls).dial(server.local_address()).await.unwrap();
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
    let tls = authority.client().server_name("other.example").unwrap();
    let text = refused(Connection::builder().tls(tls), server.local_address()).await;
    assert!(text.contains("elsewhere.example") && text.contains("should be for other.example"), "{text}");
}

#[tokio::test]
async fn a_client_that_may_not_come_is_told_why_before_anything_counts_as_sent() {
    let authority = authority();
    authority.issue_expired("expired", &["client.example"]);
    let other = Authority::new("Somebody else");
    other.issue("client", &["client.example"]);
    let strange = authority.client().certificate(other.path("client.pem"), other.path("client.key")).unwrap();
    let record = Recorder::default();
    let tls = authority.server("server").client_ca(authority.path("ca.pem")).unwrap();
    let server = serve(tls, record.clone()).await;
    for (tls, words) in [
        (authority.client(), "demands a certificate"),
        (authority.certified("expired"), "has expired"),
        (strange, "does not know the authority"),
    ] {
        for delivery in [Delivery::Sent, Delivery::Acked] {
            let builder = Connection::builder().delivery(delivery).tls(tls.clone());
            let text = refused(builder, server.local_address()).await;
            assert!(text.contains(words), "{text}");
        }
        let lazy = Connection::builder().tls(tls).retry(Retry::Attempts(2)).dial_lazy(server.local_address()).unwrap();
        lazy.send(b"never").await.unwrap();
        in_time("giving up", lazy.closed()).await;
        assert_eq!((lazy.stats().settled, lazy.stats().failed), (0, 1));
    }
    until("the server knows", || server.stats().broken_handshake == 12).await;
    assert_eq!((record.count(), record.peers().len()), (0, 0));
}

#[tokio::test]
async fn a_client_offers_what_only_aws_lc_can_do_if_that_feature_is_on_and_else_does_not() {
    let authority = authority();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let _connection = Connection::builder().tls(authority.client()).dial_lazy(&address).unwrap();
    let (mut client, _) = in_time("it comes", listener.accept()).await.unwrap();
    let mut header = [0; 5];
    in_time("its first word", client.read_exact(&mut header)).await.unwrap();
    let mut hello = vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))];
    in_time("the rest of that", client.read_exact(&mut hello)).await.unwrap();
    let groups = key_exchanges(&hello);
    let (x25519, x25519_with_ml_kem) = (0x001d, 0x11ec);
    assert!(groups.contains(&x25519), "{groups:04x?}");
    assert_eq!(groups.contains(&x25519_with_ml_kem), cfg!(feature = "tls-aws-lc"), "{groups:04x?}");
}

/// The groups of a ClientHello, by their numbers.
fn key_exchanges(hello: &[u8]) -> Vec<u16> {
    let number = |at: usize| u16::from_be_bytes([hello[at], hello[at + 1]]);
    // Kind, length, version and random; then session id, cipher suites and compression, each with its length.
    let mut at = 4 + 2 + 32;
    at += 1 + usize::from(hello[at]);
    at += 2 + usize::from(number(at));
    at += 1 + usize::from(hello[at]) + 2;
    let supported_groups = 10;
    while number(at) != supported_groups {
        at += 4 + usize::from(number(at + 2));
    }
    let count = usize::from(number(at + 4)) / 2;
    (0..count).map(|index| number(at + 6 + 2 * index)).collect()
}

#[tokio::test]
async fn handlers_see_who_the_other_side_is() {
    let authority = authority();
    authority.issue("client", &["client.example", "spiffe://example/sensor"]);
    let (told, seen) = std::sync::mpsc::channel();
    let server = serve(
        authority.server("server").client_ca(authority.path("ca.pem")).unwrap(),
        per_connection(move |peer: &Peer| {
            told.send(peer.identity().cloned()).unwrap();
            Echo(peer.clone())
        }),
    )
    .await;
    let (told, seen_by_client) = std::sync::mpsc::channel();
    let connection = Connection::builder()
        .tls(authority.certified("client"))
        .handler(per_connection(move |peer: &Peer| {
            told.send(peer.identity().cloned()).unwrap();
            Discard
        }))
        .dial(server.local_address())
        .await
        .unwrap();
    until("the handler is there", || server.stats().open == 1).await;
    let (_, client) =
        in_time("who came", async { tokio::task::spawn_blocking(move || (0, seen.recv().unwrap())).await.unwrap() })
            .await;
    let client = client.expect("the client has a certificate");
    assert_eq!(client.names(), ["client.example", "spiffe://example/sensor"]);
    let pem = fs::read_to_string(authority.path("client.pem")).unwrap();
    assert_eq!(pem::parse(&pem), client.certificate());
    connection.send(b"x").await.unwrap();
    until("the reply is there", || connection.received().messages == 1).await;
    let there = seen_by_client.recv().unwrap();
    assert_eq!(there.expect("a server has one").names(), ["localhost"]);
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
    // Without TLS nobody is anybody.
    let record = Recorder::default();
    let plain = Listener::bind("127.0.0.1:0").await.unwrap().spawn(per_connection(move |peer: &Peer| {
        assert_eq!(peer.identity(), None);
        Arc::new(record.clone()).connected(peer)
    }));
    let connection = Connection::dial(plain.local_address()).await.unwrap();
    connection.send(b"x").await.unwrap();
    until("it is received", || plain.stats().messages == 1).await;
}

/// As much of PEM as the tests need.
mod pem {
    pub(super) fn parse(text: &str) -> Vec<u8> {
        let digits: String = text.lines().filter(|line| !line.starts_with('-')).collect();
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
        for digit in digits.bytes().filter(|digit| *digit != b'=') {
            bits = bits << 6 | alphabet.iter().position(|letter| *letter == digit).unwrap() as u32;
            count += 6;
            if count >= 8 {
                count -= 8;
                bytes.push((bits >> count) as u8);
            }
        }
        bytes
    }
}

#[tokio::test]
async fn a_stream_belongs_to_who_began_it_and_a_newer_certificate_is_still_the_same_who() {
    let authority = authority();
    authority.issue("client", &["client.example"]);
    let server =
        serve(authority.server("server").client_ca(authority.path("ca.pem")).unwrap(), Recorder::default()).await;
    let tls = authority.certified("client");
    let connection =
        Connection::builder().delivery(Delivery::Acked).tls(tls.clone()).dial(server.local_address()).await.unwrap();
    connection.send(b"one").await.unwrap();
    in_time("it is settled", connection.flush()).await.unwrap();

    authority.issue("client", &["client.example"]);
    tls.reload().unwrap();
    connection.reopen();
    connection.send(b"two").await.unwrap();
    assert_eq!(in_time("it is settled", connection.flush()).await.unwrap().settled, 2);

    authority.issue("client", &["thief.example"]);
    tls.reload().unwrap();
    connection.reopen();
    in_time("the refusal", connection.closed()).await;
    let refusal = connection.refusal().expect("it was refused");
    assert!(refusal.contains("another certificate"), "{refusal}");
}

#[tokio::test]
async fn certificates_that_name_nobody_are_not_taken_for_each_other() {
    let authority = authority();
    let nameless = || authority.issue_with("client", &["127.0.0.2"], |it| it.distinguished_name = Default::default());
    nameless();
    let server =
        serve(authority.server("server").client_ca(authority.path("ca.pem")).unwrap(), Recorder::default()).await;
    let tls = authority.certified("client");
    let connection =
        Connection::builder().delivery(Delivery::Acked).tls(tls.clone()).dial(server.local_address()).await.unwrap();
    connection.send(b"one").await.unwrap();
    connection.reopen();
    connection.send(b"two").await.unwrap();
    assert_eq!(in_time("they are settled", connection.flush()).await.unwrap().settled, 2);

    nameless();
    tls.reload().unwrap();
    connection.reopen();
    in_time("the refusal", connection.closed()).await;
    let refusal = connection.refusal().expect("it was refused");
    assert!(refusal.contains("another certificate"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_exchanged_under_load_and_nothing_is_lost() {
    const MESSAGES: u64 = 50_000;
    const EXCHANGES: u64 = 10;
    let authority = authority();
    let tls = authority.server("server");
    let seen = Arc::new(AtomicU64::new(0));
    let server = serve(tls.clone(), {
        let seen = Arc::clone(&seen);
        move |message: &[u8]| {
            // In order, none missing and none twice.
            assert_eq!(seen.fetch_add(1, Ordering::Relaxed).to_be_bytes(), message);
            Ok(())
        }
    })
    .await;
    let (told, certificates) = std::sync::mpsc::channel();
    let builder = Connection::builder().delivery(Delivery::Acked).window(64 * 1024).tls(authority.client());
    let connection = builder
        .handler(per_connection(move |peer: &Peer| {
            told.send(peer.identity().unwrap().certificate().to_vec()).unwrap();
            Discard
        }))
        .dial(server.local_address())
        .await
        .unwrap();
    let untouched = Connection::builder().tls(authority.client()).dial(server.local_address()).await.unwrap();
    let mut events = connection.events();
    for number in 0..MESSAGES {
        connection.send(&number.to_be_bytes()).await.unwrap();
        if number % (MESSAGES / EXCHANGES) == 100 {
            authority.issue("server", &["127.0.0.1"]);
            tls.reload().unwrap();
            connection.reopen();
            in_time("another socket", async { while !matches!(events.next().await, Some(Event::Connected { .. })) {} })
                .await;
        }
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (MESSAGES, 0));
    assert_eq!(seen.load(Ordering::Relaxed), MESSAGES);
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
    let certificates: Vec<_> = certificates.iter().collect();
    assert_eq!(certificates.len() as u64, EXCHANGES + 1);
    assert!(certificates.windows(2).all(|two| two[0] != two[1]), "each socket was given the newest certificate");
    until("one is left, which was not touched", || server.stats().open == 1).await;
    assert_eq!(untouched.state(), State::Connected);
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_and_change_nothing() {
    let authority = authority();
    authority.issue("other", &["127.0.0.1"]);
    let tls = authority.server("server");
    let server = serve(tls.clone(), Recorder::default()).await;
    fs::copy(authority.path("other.key"), authority.path("server.key")).unwrap();
    let error = tls.reload().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Tls);
    let text = error.to_string();
    assert!(text.contains("server.key: it is not the key of the certificate in"), "{text}");
    fs::write(authority.path("server.pem"), "rubbish").unwrap();
    let text = tls.reload().unwrap_err().to_string();
    assert!(text.contains("server.pem: there is no certificate in it"), "{text}");
    fs::remove_file(authority.path("server.pem")).unwrap();
    let text = tls.reload().unwrap_err().to_string();
    assert!(text.contains("server.pem: No such file"), "{text}");
    let text = TlsClient::with_ca_file(authority.path("none.pem")).unwrap_err().to_string();
    assert!(text.contains("none.pem: No such file"), "{text}");
    let text = authority.server("other").client_ca(authority.path("other.key")).unwrap_err().to_string();
    assert!(text.contains("other.key: there is no certificate in it"), "{text}");
    let connection = Connection::builder().tls(authority.client()).dial(server.local_address()).await.unwrap();
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
}

#[test]
fn a_key_that_is_encrypted_or_cut_off_is_told_so() {
    let authority = authority();
    let key = fs::read_to_string(authority.path("server.key")).unwrap();
    let told = |content: &str| {
        fs::write(authority.path("broken.key"), content).unwrap();
        let error = TlsServer::from_pem_files(authority.path("server.pem"), authority.path("broken.key"));
        error.unwrap_err().to_string()
    };
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let of_old =
        key.replacen("PRIVATE KEY-----", "PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,0\n", 1);
    for content in [encrypted, of_old] {
        let text = told(&content);
        assert!(
            text.contains("broken.key: the private key in it is encrypted") && text.contains("`openssl pkey`"),
            "{text}"
        );
    }
    let text = told(&key[..key.len() / 2]);
    assert!(
        text.ends_with("broken.key: it is cut off: no line `-----END PRIVATE KEY-----` ends the private key"),
        "{text}"
    );
    let text = told(&key.replacen("KEY-----", "KEY---", 1));
    assert!(text.contains("the line `-----BEGIN PRIVATE KEY---` begins nothing"), "{text}");
}

#[tokio::test]
async fn a_lazy_connection_tries_on_until_the_certificate_is_right() {
    let authority = authority();
    authority.issue("server", &["elsewhere.example"]);
    let tls = authority.server("server");
    let record = Recorder::default();
    let server = serve(tls.clone(), record.clone()).await;
    let connection = Connection::builder().tls(authority.client()).dial_lazy(server.local_address()).unwrap();
    connection.send(b"kept").await.unwrap();
    until("it was refused twice", || server.stats().broken_handshake >= 2).await;
    assert_eq!((connection.stats().in_flight, record.count()), (1, 0));
    authority.issue("server", &["127.0.0.1"]);
    tls.reload().unwrap();
    record.has(1).await;
}

#[tokio::test]
async fn strangers_who_say_nothing_delay_nobody_and_are_cut_at_the_deadline() {
    const STRANGERS: usize = 200;
    let authority = authority();
    let record = Recorder::default();
    let builder = Listener::builder().handshake_deadline(Duration::from_secs(3));
    let server = serve_with(builder, authority.server("server"), record.clone()).await;
    let mut strangers = Vec::new();
    for _ in 0..STRANGERS {
        strangers.push(connect(server.local_address()).await);
    }
    until("all are there", || server.stats().open == STRANGERS as u64).await;
    let connection = Connection::builder().tls(authority.client()).dial(server.local_address()).await.unwrap();
    connection.send(b"healthy").await.unwrap();
    record.has(1).await;
    assert_eq!(server.stats().broken_handshake_deadline, 0, "nobody had to be cut for that");
    for stranger in &mut strangers {
        closed(stranger).await;
    }
    until("they are gone", || server.stats().open == 1).await;
    assert_eq!(server.stats().broken_handshake_deadline, STRANGERS as u64);
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
}

#[tokio::test]
async fn handshakes_beyond_the_limit_are_refused_and_those_under_way_count_as_connections() {
    let authority = authority();
    let builder = Listener::builder().max_handshakes(2);
    let server = serve_with(builder, authority.server("server"), Recorder::default()).await;
    let builder = Listener::builder().max_connections(2);
    let narrow = serve_with(builder, authority.server("server"), Recorder::default()).await;
    for server in [server, narrow] {
        let strangers = [connect(server.local_address()).await, connect(server.local_address()).await];
        until("both are there", || server.stats().open == 2).await;
        closed(&mut connect(server.local_address()).await).await;
        let stats = server.stats();
        assert_eq!((stats.refused, stats.refused_handshakes + stats.refused_too_many), (1, 1));
        drop(strangers);
        until("both are gone", || server.stats().open == 0).await;
        let connection = Connection::builder().tls(authority.client()).dial(server.local_address()).await.unwrap();
        in_time("closing", connection.close(PATIENCE)).await.unwrap();
        assert_eq!(server.stats().broken_handshake, 2);
    }
}

#[tokio::test]
async fn strangers_who_have_all_handshakes_under_way_give_one_up_to_somebody_else() {
    let authority = authority();
    let builder = Listener::builder().max_handshakes(2).handshake_deadline(2 * PATIENCE);
    let server = serve_with(builder, authority.server("server"), Recorder::default()).await;
    let mut strangers = Vec::new();
    for count in 1..=2 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        strangers.push(socket.connect(server.local_address().to_string().parse().unwrap()).await.unwrap());
        until("it is there", || server.stats().open == count).await;
    }
    let builder = Connection::builder().tls(authority.client());
    let connection = in_time("dialling", builder.dial(server.local_address())).await.unwrap();
    closed(&mut strangers[0]).await;
    until("the oldest is gone", || server.stats().open == 2).await;
    let stats = server.stats();
    assert_eq!((stats.refused, stats.broken, stats.broken_handshake), (0, 1, 1));
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_handshakes() {
    let authority = authority();
    let builder = Listener::builder().handshake_deadline(2 * PATIENCE);
    let server = serve_with(builder, authority.server("server"), Recorder::default()).await;
    let mut stranger = connect(server.local_address()).await;
    until("it is there", || server.stats().open == 1).await;
    let report = in_time("the shutdown", server.shutdown(2 * PATIENCE)).await;
    assert_eq!((report.cut, report.received.broken_handshake), (0, 0));
    closed(&mut stranger).await;
}

/// Passes one connection on to the address; ends what goes there, with nothing further to say, when it is told to.
async fn passage(to: &Address) -> (Address, oneshot::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, to) = (Address::from(listener.local_addr().unwrap()), to.to_string());
    let (end, mut ended) = oneshot::channel();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(to).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
            _ = &mut ended => {}
        }
        let _ = server.shutdown().await;
        // Kept open, so that the other end is not what tells the server.
        let _ = client.read_to_end(&mut Vec::new()).await;
    });
    (address, end)
}

#[tokio::test]
async fn an_end_of_the_tcp_stream_alone_is_not_taken_for_the_end_of_the_messages() {
    let authority = authority();
    let record = Recorder::default();
    let server = serve(authority.server("server"), record.clone()).await;
    let (address, end) = passage(server.local_address()).await;
    let connection = Connection::builder().tls(authority.client()).dial(&address).await.unwrap();
    connection.send(b"one").await.unwrap();
    record.has(1).await;
    end.send(()).unwrap();
    until("the server has noticed", || record.ends().len() == 1).await;
    assert!(record.ends()[0].contains("truncated"), "{:?}", record.ends());
    until("it is counted", || server.stats().broken == 1).await;

    let connection = Connection::builder().tls(authority.client()).dial(server.local_address()).await.unwrap();
    in_time("closing", connection.close(PATIENCE)).await.unwrap();
    until("the server has noticed", || record.ends().len() == 2).await;
    assert_eq!(record.ends()[1], "the peer ended its stream");
    until("it is gone", || server.stats().open == 0).await;
    assert_eq!(server.stats().broken, 1);
}

#[tokio::test]
async fn one_side_with_tls_and_one_without_part_at_once() {
    let authority = authority();
    let record = Recorder::default();
    let secure = serve(authority.server("server"), record.clone()).await;
    // What is sent plainly counts as settled when the kernel has it.
    let plain = Connection::dial(secure.local_address()).await.unwrap();
    plain.send(b"lost").await.unwrap();
    until("it was refused", || secure.stats().broken_handshake >= 1).await;
    let builder = Connection::builder().delivery(Delivery::Acked);
    let error = in_time("the refusal", builder.dial(secure.local_address())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert_eq!((record.count(), record.peers().len()), (0, 0));
    let plain = Listener::bind("127.0.0.1:0").await.unwrap().spawn(record.clone());
    let text = refused(Connection::builder().tls(authority.client()), plain.local_address()).await;
    assert!(text.contains("may not speak TLS"), "{text}");
    assert_eq!(record.count(), 0);
}

#[cfg(unix)]
#[tokio::test]
async fn a_unix_socket_takes_tls_if_a_name_is_given_and_a_brought_stream_takes_none() {
    let authority = authority();
    let address = Address::Unix(authority.path("socket"));
    let builder = Listener::builder().tls(authority.server("server"));
    let server = builder.clone().bind(&address).await.unwrap().spawn(Recorder::default());
    let error = Connection::builder().tls(authority.client()).dial(&address).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    let tls = authority.client().server_name("localhost").unwrap();
    let connection = Connection::builder().tls(tls.clone()).dial(&address).await.unwrap();
    connection.send(b"x").await.unwrap();
    until("it is received", || server.stats().messages == 1).await;
    let (one, other) = tokio::io::duplex(1024);
    let error = Connection::builder().tls(tls).from_io(one).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    let error = builder.serve_io(other, Recorder::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    let error = authority.client().server_name("no name").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
}

#[tokio::test]
async fn each_of_several_endpoints_must_be_who_its_own_name_says() {
    let authority = authority();
    let (wrong, right) = (Recorder::default(), Recorder::default());
    authority.issue("by-address", &["127.0.0.1"]);
    let one = serve(authority.server("by-address"), wrong.clone()).await;
    let two = serve(authority.server("by-address"), right.clone()).await;
    // The same certificate is good for an address, and not for the name.
    let endpoints = [format!("localhost:{}", port(one.local_address())), two.local_address().to_string()];
    let builder = Connection::builder().tls(authority.client());
    let connection = in_time("the second is accepted", builder.dial(endpoints)).await.unwrap();
    connection.send(b"x").await.unwrap();
    right.has(1).await;
    assert!(wrong.peers().is_empty());
    let nameless = [Address::from("127.0.0.1:1".parse::<std::net::SocketAddr>().unwrap()), Address::Unix("/x".into())];
    let error = Connection::builder().tls(authority.client()).dial(nameless).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration, "also of those that come later");
}
