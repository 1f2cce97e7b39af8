use std::fs;
use std::process::{Command, Stdio};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

use crate::program::{Folder, Program, Signal, text};
use crate::reconnect::account;

/// A folder with an authority, `ca.pem`, and certificates of it.
pub(crate) struct Authority {
    folder: Folder,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let folder = Folder::new();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        folder.file("ca.pem", parameters.self_signed(&key).unwrap().pem().as_bytes());
        Authority { folder, issuer: Issuer::new(parameters, key) }
    }

    fn issue(&self, name: &str, for_whom: &str) {
        self.issue_until(name, for_whom, 2100);
    }

    fn issue_until(&self, name: &str, for_whom: &str, year: i32) {
        let mut parameters = CertificateParams::new([for_whom.to_owned()]).unwrap();
        parameters.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        self.folder.file(&format!("{name}.pem"), certificate.pem().as_bytes());
        self.folder.file(&format!("{name}.key"), key.serialize_pem().as_bytes());
    }

    pub(crate) fn file(&self, name: &str) -> String {
        text(&self.folder.path(name))
    }

    /// A `listen` with the certificate of this name, that demands one of its senders or does not.
    pub(crate) fn listen(&self, name: &str, demanding: bool) -> (Program, String) {
        let [chain, key, ca] = [&format!("{name}.pem"), &format!("{name}.key"), "ca.pem"].map(|file| self.file(file));
        let mut options = vec!["--tls-cert", &chain, "--tls-key", &key];
        if demanding {
            options.extend(["--tls-ca", &ca]);
        }
        Program::listen(&options)
    }
}

pub(crate) fn authority() -> Authority {
    let authority = Authority::new("Authority of the tests");
    authority.issue("server", "127.0.0.1");
    authority
}

#[test]
fn messages_go_over_tls_with_certificates_on_both_sides() {
    let authority = authority();
    authority.issue("client", "client.example");
    let (listen, address) = authority.listen("server", true);
    let [ca, chain, key] = ["ca.pem", "client.pem", "client.key"].map(|file| authority.file(file));
    for delivery in ["sent", "acked"] {
        let options = ["--tls-ca", &ca, "--tls-cert", &chain, "--tls-key", &key, "--delivery", delivery];
        let ended = Program::run(["send", &address].iter().chain(&options), b"one\ntwo\n");
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        assert_eq!(account(&ended), [2, 2, 0]);
    }
    listen.wait_lines(4);
    listen.signal(Signal::TERM);
    let ended = listen.end();
    assert_eq!(ended.stdout, b"one\ntwo\none\ntwo\n");
    assert_eq!(ended.last_line(), "received 4 messages, 12 bytes");
    assert_eq!(ended.errors(), [] as [&str; 0]);
}

#[test]
fn whoever_is_not_who_he_should_be_is_refused_and_both_sides_say_why() {
    let authority = authority();
    let other = Authority::new("Somebody else");
    authority.issue("elsewhere", "elsewhere.example");
    authority.issue_until("expired", "127.0.0.1", 2020);
    let (ca, strange) = (authority.file("ca.pem"), other.file("ca.pem"));
    for (certificate, demanding, options, sender_says, listener_says) in [
        ("server", false, vec!["--tls-ca", &strange], "Authority of the tests", "does not know the authority"),
        ("elsewhere", false, vec!["--tls-ca", &ca], "should be for 127.0.0.1", "not for the name"),
        (
            "server",
            false,
            vec!["--tls-ca", &ca, "--tls-name", "x.example"],
            "should be for x.example",
            "not for the name",
        ),
        ("expired", false, vec!["--tls-ca", &ca], "has expired", "has expired"),
        ("server", true, vec!["--tls-ca", &ca], "demands a certificate", "has shown no certificate"),
    ] {
        let (listen, address) = authority.listen(certificate, demanding);
        let options = [&options[..], &["--retry-for", "0"]].concat();
        let ended = Program::run(["send", &address].iter().chain(&options), b"one\n");
        assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
        assert!(ended.stderr.contains(sender_says), "{sender_says} in: {}", ended.stderr);
        assert!(ended.stderr.contains("--tls-ca FILE says"), "what to do: {}", ended.stderr);
        // The refusal may come before the input.
        let [accepted, settled, failed] = account(&ended);
        assert_eq!((settled, accepted), (0, failed), "{}", ended.stderr);
        listen.wait_stderr(listener_says, |said| String::from_utf8_lossy(said).contains(listener_says).then_some(()));
        listen.signal(Signal::TERM);
        assert_eq!(listen.end().stdout, b"");
    }
}

#[test]
fn who_reaches_nobody_is_told_of_listeners_and_not_of_certificates() {
    let authority = authority();
    let ca = authority.file("ca.pem");
    let folder = Folder::new();
    let nobody = format!("unix:{}", folder.path("nobody").display());
    let recording = folder.file("a.rec", b"");
    let recorder = Program::start(["record", "127.0.0.1:0", &recording, "--force", "--count", "1"]);
    Program::run(["send", &recorder.address()], b"one\n");
    recorder.end();
    for tls in [&[][..], &["--tls-ca", &ca, "--tls-name", "localhost"]] {
        for command in
            [&["send", &nobody, "--retry-for", "0"][..], &["replay", &recording, &nobody, "--retry-for", "0"]]
        {
            let ended = Program::run(command.iter().chain(tls), b"one\n");
            assert_eq!(ended.code(), Some(1));
            assert!(ended.stderr.contains("start `buffstreams listen` there"), "what to do: {}", ended.stderr);
            assert!(!ended.stderr.contains("certificates"), "{}", ended.stderr);
        }
    }
}

#[test]
fn a_hangup_reads_the_files_again_and_rubbish_in_them_changes_nothing() {
    let authority = authority();
    let next = Authority::new("The next authority");
    next.issue("server", "127.0.0.1");
    let (listen, address) = authority.listen("server", false);
    let (old_ca, new_ca) = (authority.file("ca.pem"), next.file("ca.pem"));
    let send = |ca: &str| Program::run(["send", &address, "--tls-ca", ca, "--retry-for", "0"], b"x\n").code();
    let says = |line: &str| {
        listen.signal(Signal::HUP);
        listen.wait_stderr(line, |said| String::from_utf8_lossy(said).contains(line).then_some(()));
    };
    // It was there before, and stays.
    let mut open = Program::start(["send", &address, "--tls-ca", &old_ca]);
    open.write(b"x\n");
    listen.wait_lines(1);
    fs::write(authority.file("server.pem"), "rubbish").unwrap();
    says("server.pem: there is no certificate in it");
    assert_eq!((send(&old_ca), send(&new_ca)), (Some(0), Some(1)));
    for file in ["server.pem", "server.key"] {
        fs::copy(next.file(file), authority.file(file)).unwrap();
    }
    says("the files were read again");
    assert_eq!((send(&old_ca), send(&new_ca)), (Some(1), Some(0)));
    open.write_all_and_close(b"y\n");
    let ended = open.end();
    assert_eq!(account(&ended), [2, 2, 0]);
    assert_eq!(ended.errors(), [] as [&str; 0]);
    listen.wait_lines(4);
}

#[test]
fn a_sender_reads_its_authorities_again_too_and_finds_its_listener_then() {
    let authority = authority();
    let next = Authority::new("The next authority");
    next.issue("server", "127.0.0.1");
    let (listen, address) = next.listen("server", false);
    let mut send = Program::start(["send", &address, "--tls-ca", &authority.file("ca.pem")]);
    send.write(b"x\n");
    send.wait_stderr("the refusal", |said| String::from_utf8_lossy(said).contains("none of those in").then_some(()));
    fs::copy(next.file("ca.pem"), authority.file("ca.pem")).unwrap();
    send.signal(Signal::HUP);
    listen.wait_lines(1);
    send.write_all_and_close(b"y\n");
    let ended = send.end();
    assert_eq!(account(&ended), [2, 2, 0]);
    listen.wait_lines(2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_listener_whose_terminal_is_closed_ends_in_order_and_reads_its_files_again_as_long_as_it_is_open() {
    let authority = authority();
    let [chain, key, ca] = ["server.pem", "server.key", "ca.pem"].map(|file| authority.file(file));
    let arguments = ["listen", "127.0.0.1:0", "--tls-cert", &chain, "--tls-key", &key];
    let (listen, terminal) = Program::start_in_session_of_terminal(arguments);
    let sent = Program::run(["send", &listen.address(), "--tls-ca", &ca], b"x\n");
    assert_eq!(account(&sent), [1, 1, 0], "{}", sent.stderr);
    listen.signal(Signal::HUP);
    let again = "the files were read again";
    listen.wait_stderr(again, |said| String::from_utf8_lossy(said).contains(again).then_some(()));
    listen.wait_lines(1);
    terminal.hang_up();
    let ended = listen.end();
    assert_eq!((ended.code(), ended.last_line()), (Some(0), "received 1 messages, 1 bytes"), "{}", ended.stderr);
}

#[test]
fn the_system_decides_whom_to_believe_if_no_file_does() {
    let authority = authority();
    let (listen, address) = authority.listen("server", false);
    let send = |roots: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_buffstreams"));
        let file = authority.folder.file("input", b"x\n");
        command.args(["send", &address, &file, "--tls", "--retry-for", "0"]).env("SSL_CERT_FILE", roots);
        command.env_remove("SSL_CERT_DIR").output().unwrap()
    };
    assert_eq!(send(&authority.file("ca.pem")).status.code(), Some(0));
    listen.wait_lines(1);
    let other = Authority::new("Somebody else");
    let refused = send(&other.file("ca.pem"));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("none of those that the system believes"), "{said}");
}

#[test]
fn files_that_cannot_be_read_end_with_1_and_their_path() {
    let authority = authority();
    let [chain, key, ca] = ["server.pem", "server.key", "ca.pem"].map(|file| authority.file(file));
    let cases: &[(&[&str], &str)] = &[
        (&["listen", "127.0.0.1:0", "--tls-cert", "/nowhere.pem", "--tls-key", &key], "/nowhere.pem"),
        (&["listen", "127.0.0.1:0", "--tls-cert", &chain, "--tls-key", "/nowhere.key"], "/nowhere.key"),
        (&["listen", "127.0.0.1:0", "--tls-cert", &chain, "--tls-key", &ca], "ca.pem"),
        (&["listen", "127.0.0.1:0", "--tls-cert", &chain, "--tls-key", &key, "--tls-ca", &key], "server.key"),
        (&["send", ":1", "--tls-ca", "/nowhere.pem"], "/nowhere.pem"),
        (&["send", ":1", "--tls-ca", &ca, "--tls-cert", &chain, "--tls-key", "/nowhere.key"], "/nowhere.key"),
    ];
    for (arguments, path) in cases {
        let ended = Program::run(*arguments, b"");
        assert_eq!(ended.code(), Some(1), "{arguments:?}: {}", ended.stderr);
        assert!(ended.errors().iter().any(|error| error.contains(path)), "{path} in: {}", ended.stderr);
    }
}

/// `openssl`, or a line that says that there is none.
fn openssl(arguments: &[&str]) -> Option<Command> {
    if Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: there is no openssl on this machine");
        return None;
    }
    let mut command = Command::new("openssl");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

#[test]
fn openssl_sends_to_listen_and_an_older_tls_is_refused() {
    let authority = authority();
    authority.issue("client", "client.example");
    let (listen, address) = authority.listen("server", true);
    let [ca, chain, key] = ["ca.pem", "client.pem", "client.key"].map(|file| authority.file(file));
    let options = ["s_client", "-connect", &address, "-CAfile", &ca, "-verify_return_error", "-verify_ip", "127.0.0.1"];
    let certified = [&options[..], &["-quiet", "-cert", &chain, "-key", &key]].concat();
    let Some(mut client) = openssl(&certified) else { return };
    let mut client = client.spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"\x0a\x00\x00hello\x0a\x00\x00world").unwrap();
    listen.wait_lines(2);
    drop(input);
    let _ = client.kill();
    client.wait().unwrap();

    for (extra, says) in [(&["-tls1_2", "-cert", &chain, "-key", &key][..], "TLS"), (&[], "has shown no certificate")] {
        let arguments = [&options[..], extra].concat();
        let mut client = openssl(&arguments).unwrap().spawn().unwrap();
        // Where its input ends, it may leave without having listened.
        let input = client.stdin.take();
        let output = client.wait_with_output().unwrap();
        drop(input);
        listen.wait_stderr(says, |said| String::from_utf8_lossy(said).contains(says).then_some(()));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("alert"), "openssl is told: {said}");
    }
    listen.signal(Signal::TERM);
    let ended = listen.end();
    assert_eq!(ended.stdout, b"hello\nworld\n");
}

#[test]
fn send_shows_its_certificate_to_openssl() {
    let authority = authority();
    authority.issue("client", "client.example");
    let [ca, chain, key] = ["ca.pem", "server.pem", "server.key"].map(|file| authority.file(file));
    let [own_chain, own_key] = ["client.pem", "client.key"].map(|file| authority.file(file));
    // It says where it listens.
    let options = ["s_server", "-accept", "127.0.0.1:0", "-naccept", "1", "-cert", &chain, "-key", &key];
    let options = [&options[..], &["-CAfile", &ca, "-Verify", "2", "-verify_return_error"]].concat();
    let Some(mut server) = openssl(&options) else { return };
    let mut server = server.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(server.stdout.take().unwrap()));
    let address = lines.find_map(|line| line.unwrap().strip_prefix("ACCEPT ").map(str::to_owned)).unwrap();
    let own = ["--tls-ca", &ca, "--tls-cert", &own_chain, "--tls-key", &own_key];
    let ended = Program::run(["send", &address, "--framing", "u32be"].iter().chain(&own), b"hello\n");
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let printed: Vec<_> = lines.map(Result::unwrap).collect();
    assert!(printed.iter().any(|line| line.contains("hello")), "{printed:?}");
    server.wait().unwrap();
}
